"""Every option is honoured or refused by name."""

import pytest

from uta_fx import Config
from uta_fx.tails import Tail


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"density": 0}, ValueError, r"density must be in \(0, 1\], got 0"),
        ({"density": -0.1}, ValueError, "density must be"),
        ({"density": float("nan")}, ValueError, "density must be"),
        ({"density": "0.1"}, TypeError, "density must be a number"),
        ({"dense_until": 1.1}, ValueError, r"dense_until must be in \[0, 1\]"),
        ({"budget": "block"}, ValueError, "budget must be one of site, head, row, got 'block'"),
        ({"policy": "best"}, ValueError, "policy must be one of low_delta, topk"),
        ({"policy": 3}, TypeError, "policy must be a name or have a method select"),
        ({"tail": "long"}, ValueError, "tail must be one of none, normalizer, single"),
        ({"tail": 3}, TypeError, "tail must be a name or"),
        (
            {"reorder": "zigzag"},
            ValueError,
            "reorder must be one of auto, none, tile, morton, hilbert",
        ),
        ({"block_q": 48}, ValueError, "block_q must be one of 16, 32, 64, 128, got 48"),
        ({"bins": 0}, ValueError, "bins must be at least 1"),
        ({"min_tokens": 1.5}, TypeError, "min_tokens must be an int"),
        ({"grid": (3, 4)}, ValueError, "grid must be three ints"),
        ({"grid": (3, 4, 0)}, ValueError, "grid must hold positive sides"),
        ({"exact_frames": -1}, ValueError, "exact_frames must be at least 0, got -1"),
        ({"exact_frames": True}, TypeError, "exact_frames must be an int, got True"),
        (
            {"exact_frames": 4, "grid": (3, 8, 8)},
            ValueError,
            "exact_frames must be at most the frames of the grid, 3, got 4",
        ),
        ({"video_start": 1.0}, TypeError, "video_start must be an int, got 1.0"),
        ({"video_start": -1}, ValueError, "video_start must be at least 0, got -1"),
        ({"video_start": 8}, ValueError, "video_start=8 needs grid"),
        ({"dense_layers": "a-b"}, ValueError, "dense_layers must be numbers and ranges"),
        ({"dense_layers": "0,5-2"}, ValueError, "dense_layers must hold rising ranges, got .5-2."),
        ({"dense_layers": 3}, TypeError, "dense_layers must be a string"),
        ({"strict": "yes"}, TypeError, "strict must be True or False"),
        ({"inner": None}, TypeError, "inner must be the name"),
    ],
)
def test_bad_fields_cannot_be_built(fields, error, message):
    """The message names the field, the valid values and what came."""
    with pytest.raises(error, match=message):
        Config(**fields)


def test_unknown_options_name_the_likeliest():
    """A typo is not ignored."""
    with pytest.raises(ValueError, match=r"unknown option 'densty' .did you mean 'density'"):
        Config.from_options({"densty": 0.1})


@pytest.mark.parametrize(
    ("text", "dense"),
    [("", []), ("0", [0]), ("0-1,-1", [0, 1, 9]), ("-2--1", [8, 9]), (" 3 , 5-6 ", [3, 5, 6])],
)
def test_dense_layers_are_ranges(text, dense):
    """Negative numbers count from the last layer."""
    config = Config(dense_layers=text)
    assert [i for i in range(10) if config.is_dense_layer(i, 10)] == dense


def test_a_config_is_a_value():
    """Frozen, hashable and comparable: torch.compile compares options."""
    assert Config(density=0.1) == Config(density=0.1) != Config()
    assert len({Config(), Config()}) == 1
    with pytest.raises(AttributeError):
        Config().density = 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "x"},
        {"slope": "x"},
        {"bins": 0},
        {"variance_weight": -1.0},
        {"fit": -1},
        {"fit": 0.5},
        {"fit": 8, "slope": "query_block"},
    ],
)
def test_a_bad_tail_cannot_be_built(fields):
    """The same for the tail's own fields."""
    with pytest.raises(ValueError, match=f"{'tail' if 'kind' in fields else next(iter(fields))}"):
        Tail(**fields)
