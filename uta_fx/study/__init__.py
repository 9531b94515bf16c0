"""What the choices are worth: measurements on the trained model."""
