/* Our nodes for ONNX Runtime's CUDA provider: Triton kernels, compiled beforehand.
 *
 * `onnxruntime_plugin.py` writes "variants.h", which holds the compiled kernels and, for each, the
 * list of its arguments; this file computes those arguments from a node's tensors and launches on
 * ONNX Runtime's own stream. It links against libc alone: ONNX Runtime hands over its table of
 * functions, the CUDA driver is opened when the first kernel is launched.
 */
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- ONNX Runtime's C interface, as much of it as is used here ------------------------------- */

enum { API_VERSION = 22 }; /* the oldest that is supported; its places in the table never change */
enum { TYPE_FLOAT = 1, TYPE_INT32 = 6, TYPE_INT64 = 7, TYPE_BOOL = 9, TYPE_FLOAT16 = 10,
       TYPE_BFLOAT16 = 16 };
enum { STATUS_FAIL = 1, STATUS_INVALID_ARGUMENT = 2 };
enum { MEMORY_DEFAULT = 0, MEMORY_OF_CPU_INPUT = -2, INPUT_REQUIRED = 0 };

typedef void Status;
typedef struct Api { void *functions[300]; } Api;
typedef struct ApiBase {
  const Api *(*get_api)(uint32_t version);
  const char *(*get_version)(void);
} ApiBase;
typedef struct Allocator {
  uint32_t version;
  void *(*alloc)(struct Allocator *, size_t bytes);
  void (*free)(struct Allocator *, void *memory);
  const void *(*info)(const struct Allocator *);
} Allocator;

/* name, place in the table, result, arguments */
#define API_FUNCTIONS(X)                                                                          \
  X(create_status, 0, Status *, (int code, const char *message))                                  \
  X(create_custom_op_domain, 26, Status *, (const char *name, void **domain))                     \
  X(custom_op_domain_add, 27, Status *, (void *domain, const void *op))                           \
  X(add_custom_op_domain, 28, Status *, (void *options, void *domain))                            \
  X(get_tensor_data, 51, Status *, (void *value, void **data))                                    \
  X(get_dimensions_count, 61, Status *, (const void *info, size_t *count))                        \
  X(get_dimensions, 62, Status *, (const void *info, int64_t *sizes, size_t count))               \
  X(get_type_and_shape, 65, Status *, (const void *value, void **info))                           \
  X(get_float_attribute, 85, Status *, (const void *info, const char *name, float *value))        \
  X(get_int_attribute, 86, Status *, (const void *info, const char *name, int64_t *value))        \
  X(get_input, 90, Status *, (const void *context, size_t index, const void **value))             \
  X(get_output, 91, Status *,                                                                     \
    (void *context, size_t index, const int64_t *sizes, size_t count, void **value))              \
  X(release_status, 93, void, (Status * status))                                                  \
  X(release_type_and_shape, 99, void, (void *info))                                               \
  X(release_allocator, 132, void, (Allocator * allocator))                                        \
  X(get_stream, 193, Status *, (const void *context, void **stream))                              \
  X(get_scratch, 277, Status *,                                                                   \
    (const void *context, const void *memory, size_t bytes, void **buffer))                       \
  X(get_allocator, 278, Status *, (const void *info, int type, Allocator * *allocator))

#define DECLARE(name, place, result, arguments)                                                   \
  typedef result(*name##_function) arguments;                                                     \
  static name##_function name;
API_FUNCTIONS(DECLARE)

static void bind_api(const Api *api) {
#define BIND(name, place, result, arguments) name = (name##_function)api->functions[place];
  API_FUNCTIONS(BIND)
}

/* a description of an operator; the order of the fields is ONNX Runtime's */
typedef struct CustomOp {
  uint32_t version;
  void *(*create_kernel)(const struct CustomOp *, const Api *, const void *);
  const char *(*get_name)(const struct CustomOp *);
  const char *(*get_provider)(const struct CustomOp *);
  int (*get_input_type)(const struct CustomOp *, size_t);
  size_t (*get_input_count)(const struct CustomOp *);
  int (*get_output_type)(const struct CustomOp *, size_t);
  size_t (*get_output_count)(const struct CustomOp *);
  void (*compute)(void *, void *);
  void (*destroy)(void *);
  int (*get_input_characteristic)(const struct CustomOp *, size_t);
  int (*get_output_characteristic)(const struct CustomOp *, size_t);
  int (*get_input_memory_type)(const struct CustomOp *, size_t);
  int (*get_variadic_input_minimum)(const struct CustomOp *);
  int (*get_variadic_input_homogeneity)(const struct CustomOp *);
  int (*get_variadic_output_minimum)(const struct CustomOp *);
  int (*get_variadic_output_homogeneity)(const struct CustomOp *);
  Status *(*create_kernel_v2)(const struct CustomOp *, const Api *, const void *, void **);
  Status *(*compute_v2)(void *, void *);
  Status *(*infer_shape)(const struct CustomOp *, void *);
  int (*get_start_version)(const struct CustomOp *);
  int (*get_end_version)(const struct CustomOp *);
  size_t (*get_may_inplace)(int **, int **);
  void (*release_may_inplace)(int *, int *);
  size_t (*get_alias_map)(int **, int **);
  void (*release_alias_map)(int *, int *);
  int type, dtype; /* ours: an operator for each type of node and each dtype */
} CustomOp;

static Status *fail(int code, const char *format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return create_status(code, message);
}

/* ---- The CUDA driver, as much of it as is used here ------------------------------------------ */

enum { CU_ATTRIBUTE_MAX_DYNAMIC_SHARED = 8, DEFAULT_SHARED = 48 * 1024 };

#define DRIVER_FUNCTIONS(X)                                                                       \
  X(cuCtxGetDevice, (int *device))                                                                \
  X(cuDriverGetVersion, (int *version))                                                           \
  X(cuLibraryLoadData, (void **library, const void *code, void *, void *, unsigned, void *,       \
                        void *, unsigned))                                                        \
  X(cuLibraryGetKernel, (void **kernel, void *library, const char *name))                         \
  X(cuKernelSetAttribute, (int attribute, int value, void *kernel, int device))                   \
  X(cuTensorMapEncodeTiled,                                                                       \
    (void *map, int type, uint32_t rank, void *address, const uint64_t *sizes,                    \
     const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,         \
     int swizzle, int promotion, int fill))                                                       \
  X(cuMemsetD8Async, (uint64_t address, unsigned char value, size_t bytes, void *stream))         \
  X(cuLaunchKernel, (void *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,             \
                     unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,       \
                     void *stream, void **arguments, void **extra))                               \
  X(cuGetErrorName, (int error, const char **name))

#define DECLARE_DRIVER(name, arguments)                                                           \
  typedef int(*name##_function) arguments;                                                        \
  static name##_function name;
DRIVER_FUNCTIONS(DECLARE_DRIVER)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Open the driver; the name of what is missing, or NULL. Called under the lock. */
static const char *open_driver(void) {
  static void *driver = NULL;
  if (driver) return NULL;
  void *opened = dlopen(DRIVER, RTLD_NOW | RTLD_LOCAL);
  if (!opened) return DRIVER;
#define LOOK_UP(name, arguments)                                                                  \
  if (!(name = (name##_function)dlsym(opened, #name))) return #name;
  DRIVER_FUNCTIONS(LOOK_UP)
  driver = opened;
  return NULL;
}

static Status *driver_failure(const char *what, int error) {
  const char *name = "unknown error";
  cuGetErrorName(error, &name);
  return fail(STATUS_FAIL, "uta: %s failed with %s", what, name);
}

/* ---- Kernels and their arguments ------------------------------------------------------------- */

/* a tensor map as Triton passes it on: the map itself, four sizes, four strides */
enum { MAP_ARGUMENTS = 9 };
#define MAP(X, name)                                                                              \
  X(name) X(name##_size0) X(name##_size1) X(name##_size2) X(name##_size3)                         \
  X(name##_stride0) X(name##_stride1) X(name##_stride2) X(name##_stride3)

/* what a kernel may ask for; the names are those of the Triton kernels */
#define ARGUMENTS(X)                                                                              \
  X(q_ptr) X(k_ptr) X(v_ptr) X(o_ptr) X(lse_ptr) X(ids_ptr) X(counts_ptr) X(listed_ptr)           \
  X(tail_k_ptr) X(tail_v_ptr) X(tail_size_ptr) X(tail_var_ptr) X(slope_ptr)                       \
  X(order_ptr) X(plan_ptr) X(sigma2_ptr)                                                          \
  X(q_sb) X(q_sh) X(q_sm) X(k_sb) X(k_sh) X(k_sn) X(v_sb) X(v_sh) X(v_sn)                         \
  X(o_sb) X(o_sh) X(o_sm) X(ids_sb) X(ids_sh) X(ids_sn) X(counts_sb) X(counts_sh)                 \
  X(tail_k_sb) X(tail_k_sh) X(tail_k_sn) X(tail_k_sr)                                             \
  X(tail_v_sb) X(tail_v_sh) X(tail_v_sn) X(tail_v_sr)                                             \
  X(tail_size_sb) X(tail_size_sh) X(tail_size_sn) X(tail_var_sb) X(tail_var_sh) X(tail_var_sr)    \
  X(slope_sb) X(slope_sh) X(slope_sn) X(slope_sd)                                                 \
  X(heads) X(length_q) X(length_kv) X(blocks_q) X(blocks_kv) X(max_blocks) X(representatives)     \
  X(whole) X(last_keys) X(scale) X(scale_log2) X(half_weight_log2)                                \
  X(bits_ptr) X(best_ptr) X(digits_ptr) X(tied_ptr) X(kept_ptr)                                   \
  X(wanted) X(rows) X(blocks) X(share) X(programs)                                                \
  X(mean_ptr) X(var_ptr) X(size_ptr) X(scores_ptr) X(power)                                       \
  X(k_mean_ptr) X(k_var_ptr) X(v_mean_ptr) X(v_var_ptr) X(sums_ptr) X(total_ptr)                  \
  X(length) X(blocks_per_program) X(every) X(parts) X(size)                                       \
  X(mean_sb) X(mean_sh) X(mean_sn) X(var_sb) X(var_sh) X(var_sn) X(size_sb) X(size_sh)            \
  X(exact_ptr) X(square_ptr) X(values_ptr) X(masses_ptr) X(mass_ptr) X(gain_ptr)                  \
  MAP(X, q_desc) MAP(X, k_desc) MAP(X, v_desc) MAP(X, o_desc)                                     \
  MAP(X, tail_k_desc) MAP(X, tail_v_desc) MAP(X, slope_desc) MAP(X, mean_desc) MAP(X, var_desc)
#define NAME_ARGUMENT(name) ARG_##name,
enum { ARGUMENTS(NAME_ARGUMENT) ARGUMENT_COUNT };

/* little-endian: a kernel that wants 32 bits reads the lower half */
typedef union Value {
  uint64_t pointer;
  int64_t integer;
  float number;
  _Alignas(64) uint64_t map[16];
} Value;

/* how the copy engine cuts one of the tensors that a kernel has maps of */
typedef struct Map {
  int argument;
  int swizzle; /* as the driver counts them */
  uint32_t box[4];
} Map;

typedef struct Kernel {
  const unsigned char *code; /* NULL: this variant does not need it */
  const char *name;
  int shared, threads, programs, blocks; /* so many programs for so many blocks or rows */
  const unsigned char *arguments;
  int argument_count;
  const Map *maps;
  int map_count;
} Kernel;

/* types of nodes, and the kernels of each in the order in which they run */
enum {
  SPARSE_ATTENTION, BLOCK_STATISTICS, BLOCK_SCORES, SELECT_BLOCKS, SELECT_COUNTED, LIST_BLOCKS,
  FIT_TAIL
};
enum { MARK, TAIL, LISTED, ORDER, TURNS, VARIANCE, PAIRED };
enum { POOL, SUM };
enum { SCORE };
enum { IN_ROW, FIRST, NEXT, KEEP = NEXT + 5 }; /* alone, or one after the other */
enum { LIST };
enum { SQUARE, SAMPLE, SOLVE };
enum { KERNELS = 8, KEY_SIZE = 11 };

/* for which nodes and shapes the kernels were compiled: the numbers that a node must have too */
typedef struct Variant {
  int type;
  int key[KEY_SIZE];
  Kernel kernels[KERNELS];
} Variant;

typedef struct Operator { int type, dtype; } Operator;

/* ARCHITECTURE, NODES, VARIANTS, VARIANT_COUNT, OPERATORS, OPERATOR_COUNT; numbers that launchers
 * in Python have */
#include "variants.h"

enum { MAX_DEVICES = 64 };
static void *loaded[VARIANT_COUNT][KERNELS];
static unsigned char allowed[VARIANT_COUNT][KERNELS][MAX_DEVICES];

/* The kernel ready for the current device. */
static Status *load(int variant, int which, int device, void **kernel) {
  const Kernel *source = &VARIANTS[variant].kernels[which];
  void **slot = &loaded[variant][which];
  int error = 0;
  const char *what = "loading its kernel for sm_" ARCHITECTURE
                     " (build the plugin for the architecture of this GPU)";
  pthread_mutex_lock(&lock);
  if (!*slot) {
    void *library = NULL;
    error = cuLibraryLoadData(&library, source->code, NULL, NULL, 0, NULL, NULL, 0);
    if (!error) error = cuLibraryGetKernel(slot, library, source->name);
  }
  if (!error && source->shared > DEFAULT_SHARED && !allowed[variant][which][device]) {
    what = "asking for shared memory";
    error = cuKernelSetAttribute(CU_ATTRIBUTE_MAX_DYNAMIC_SHARED, source->shared, *slot, device);
    allowed[variant][which][device] = !error;
  }
  pthread_mutex_unlock(&lock);
  *kernel = *slot;
  return error ? driver_failure(what, error) : NULL;
}

/* ---- Nodes ----------------------------------------------------------------------------------- */

typedef struct Tensor { void *data; int64_t sizes[5]; } Tensor;

enum { MOST_INPUTS = 10, MOST_OUTPUTS = 5 };

typedef struct NodeType NodeType;
typedef struct Node {
  const NodeType *type;
  int dtype;
  Allocator *allocator;
  float scale, variance_weight, variance_power;
  int64_t block_q, block_kv, per_block, kept, rows;
} Node;

/* what a node is run with */
typedef struct Run {
  const Node *node;
  void *context, *stream, *memory; /* memory: workspace */
  int variant, device;
  Tensor x[MOST_INPUTS], outputs[MOST_OUTPUTS];
  int64_t batch_heads, blocks_q, blocks_kv;
  Value values[ARGUMENT_COUNT];
} Run;

typedef struct Attribute { const char *name; int is_integer; size_t place; } Attribute;

/* T: the node's dtype; S: bfloat16 where that has 16 bits; F: float32; I: int32; M: bool;
 * N: a number, int64 in the CPU's memory */
struct NodeType {
  const char *name, *inputs, *outputs;
  int ranks[MOST_INPUTS];
  Attribute attributes[6]; /* up to one without a name */
  Status *(*run)(Run *run);
};

enum { ALIGNMENT = 16 }; /* for which the kernels are compiled */

#define TRY(call)                                                                                 \
  do {                                                                                            \
    Status *status_ = (call);                                                                     \
    if (status_) return status_;                                                                  \
  } while (0)

static Status *read_input(Run *run, size_t index) {
  const NodeType *type = run->node->type;
  Tensor *tensor = &run->x[index];
  const void *value;
  void *info;
  size_t rank;
  TRY(get_input(run->context, index, &value));
  TRY(get_type_and_shape(value, &info));
  Status *status = get_dimensions_count(info, &rank);
  if (!status && rank != (size_t)type->ranks[index])
    status = fail(STATUS_INVALID_ARGUMENT,
                  "uta::%s: input %zu must have %d dimensions, got %zu", type->name, index,
                  type->ranks[index], rank);
  if (!status) status = get_dimensions(info, tensor->sizes, rank);
  release_type_and_shape(info);
  if (status) return status;
  TRY(get_tensor_data((void *)value, &tensor->data));
  if (type->inputs[index] != 'N' && (uint64_t)tensor->data % ALIGNMENT)
    return fail(STATUS_INVALID_ARGUMENT,
                "uta::%s: input %zu must begin at a multiple of %d bytes", type->name, index,
                ALIGNMENT);
  return NULL;
}

static Status *make_output(Run *run, size_t index, int rank, const int64_t *sizes) {
  Tensor *tensor = &run->outputs[index];
  void *value;
  memcpy(tensor->sizes, sizes, rank * sizeof *sizes);
  TRY(get_output(run->context, index, sizes, rank, &value));
  TRY(get_tensor_data(value, &tensor->data));
  if ((uint64_t)tensor->data % ALIGNMENT)
    return fail(STATUS_INVALID_ARGUMENT,
                "uta::%s: output %zu must begin at a multiple of %d bytes", run->node->type->name,
                index, ALIGNMENT);
  return NULL;
}

/* The kernels for a node; its key as in the Python class of its variants. */
static Status *find_variant(Run *run, int type, const int key[KEY_SIZE]) {
  for (run->variant = 0; run->variant < VARIANT_COUNT; ++run->variant) {
    const Variant *variant = &VARIANTS[run->variant];
    int fits = variant->type == type;
    for (int i = 0; i < KEY_SIZE; ++i)
      fits = fits && (variant->key[i] == OPEN || variant->key[i] == key[i]);
    if (fits) return NULL;
  }
  const int64_t *sizes = run->x[0].sizes;
  return fail(STATUS_INVALID_ARGUMENT,
              "uta::%s: the plugin was not built for this node (input 0 is %lld x %lld x %lld x "
              "%lld): build it for this file", run->node->type->name, (long long)sizes[0],
              (long long)sizes[1], (long long)sizes[2], (long long)sizes[3]);
}

/* Where and on what the node's kernels run. */
static Status *begin(Run *run) {
  TRY(get_stream(run->context, &run->stream));
  pthread_mutex_lock(&lock);
  const char *missing = open_driver();
  pthread_mutex_unlock(&lock);
  if (missing) return fail(STATUS_FAIL, "uta: there is no %s of the CUDA driver", missing);
  int error = cuCtxGetDevice(&run->device);
  if (error) return driver_failure("asking for the device", error);
  if (run->device >= MAX_DEVICES) return fail(STATUS_FAIL, "uta: device %d", run->device);
  return NULL;
}

/* Take so many bytes of the workspace. */
static size_t reserve(size_t *workspace, int64_t bytes) {
  size_t start = *workspace;
  *workspace += ((size_t)bytes + 255) / 256 * 256;
  return start;
}

static Status *take_workspace(Run *run, size_t bytes) {
  Allocator *allocator = run->node->allocator;
  return bytes ? get_scratch(run->context, allocator->info(allocator), bytes, &run->memory) : NULL;
}

static Status *fill(Run *run, uint64_t address, int value, int64_t bytes) {
  int error = cuMemsetD8Async(address, (unsigned char)value, (size_t)bytes, run->stream);
  return error ? driver_failure("filling memory", error) : NULL;
}

static Status *launch(Run *run, int which, int64_t programs, int64_t batch_heads) {
  const Kernel *source = &VARIANTS[run->variant].kernels[which];
  void *kernel, *arguments[ARGUMENT_COUNT + 2];
  Status *status = load(run->variant, which, run->device, &kernel);
  if (status) return status;
  for (int i = 0; i < source->argument_count; ++i)
    arguments[i] = &run->values[source->arguments[i]];
  Value none = {0}; /* Triton's scratch buffers, of size 0 */
  arguments[source->argument_count] = arguments[source->argument_count + 1] = &none;
  int error = cuLaunchKernel(kernel, (unsigned)programs, (unsigned)batch_heads, 1,
                             source->threads, 1, 1, source->shared, run->stream, arguments, NULL);
  return error ? driver_failure("launching a kernel", error) : NULL;
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* strides of the leading dimensions of a contiguous tensor */
static void set_strides(Value *values, const Tensor *x, int rank, const int *places, int count) {
  for (int i = 0; i < count; ++i) {
    int64_t stride = 1;
    for (int dim = i + 1; dim < rank; ++dim) stride *= x->sizes[dim];
    values[places[i]].integer = stride;
  }
}

#define STRIDES(tensor, rank, ...)                                                                \
  do {                                                                                            \
    static const int places[] = {__VA_ARGS__};                                                    \
    set_strides(values, &(tensor), rank, places, sizeof places / sizeof *places);                 \
  } while (0)

/* without the third of five dimensions, which is 1 */
static Tensor without_third(const Tensor *x) {
  return (Tensor){x->data, {x->sizes[0], x->sizes[1], x->sizes[3], x->sizes[4]}};
}

/* heads that are next to each other: those of some samples, or some of one sample's */
typedef struct Part { int64_t first, samples, heads; } Part;

/* where the heads of a part of a contiguous tensor begin */
static char *part_data(const Tensor *x, int rank, int64_t first, int element) {
  int64_t bytes = element;
  for (int dim = 2; dim < rank; ++dim) bytes *= x->sizes[dim];
  return (char *)x->data + first * bytes;
}

/* A map of a part of a contiguous tensor [B, H, L, D] of 16 bits; beyond its end are zeros. */
static Status *set_map(Value *values, const Map *map, const Tensor *x, const Part *part,
                       int dtype) {
  enum { TYPE_OF_FLOAT16 = 6, TYPE_OF_BFLOAT16 = 9, PROMOTION_128 = 2, SMALL = 128 * 1024 };
  uint64_t sizes[4], strides[4], bytes = 2;
  uint32_t box[4];
  static const uint32_t steps[4] = {1, 1, 1, 1};
  Value *value = &values[map->argument];
  const int64_t of_part[4] = {part->samples, part->heads, x->sizes[2], x->sizes[3]};
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) { /* the driver begins with the last, and knows its stride */
    value[1 + i].integer = of_part[i];
    value[5 + i].integer = stride;
    stride *= x->sizes[i];
    sizes[3 - i] = of_part[i];
    strides[3 - i] = 2 * stride;
    bytes *= of_part[i];
    box[3 - i] = map->box[i];
  }
  int error = cuTensorMapEncodeTiled(
      value->map, dtype == TYPE_FLOAT16 ? TYPE_OF_FLOAT16 : TYPE_OF_BFLOAT16, 4,
      part_data(x, 4, part->first, 2), sizes, strides, box, steps, 0, map->swizzle, PROMOTION_128, 0);
  if (error) return driver_failure("describing a tensor", error);
  /* a driver up to 13.1 marks small tensors, and wrongly: CUTLASS and Triton 3.7 take that back */
  int version;
  error = cuDriverGetVersion(&version);
  if (error) return driver_failure("asking for its version", error);
  if (version <= 13010 && bytes <= SMALL) value->map[1] &= ~(1ull << 21);
  return NULL;
}

/* ---- SparseAttention ------------------------------------------------------------------------- */

enum {
  QUERY, KEY, VALUE, IDS, COUNTS, TAIL_KEY, TAIL_VALUE, TAIL_SIZE, TAIL_VARIANCE, TAIL_SLOPE,
  INPUTS
};
enum { OUTPUT, LSE };

static Status *launch_some(Run *run, int first, int last, int64_t batch_heads) {
  for (int which = first; which <= last; ++which) {
    const Kernel *kernel = &VARIANTS[run->variant].kernels[which];
    if (kernel->code)
      TRY(launch(run, which, divide_up(run->blocks_q * kernel->programs, kernel->blocks),
                 batch_heads));
  }
  return NULL;
}

/* Pointers to the heads from the first of a part on. */
static void set_pointers(Run *run, int64_t first) {
  static const int pointers[INPUTS] = {
      ARG_q_ptr,      ARG_k_ptr,      ARG_v_ptr,         ARG_ids_ptr,      ARG_counts_ptr,
      ARG_tail_k_ptr, ARG_tail_v_ptr, ARG_tail_size_ptr, ARG_tail_var_ptr, ARG_slope_ptr};
  const NodeType *type = run->node->type;
  int element = run->node->dtype == TYPE_FLOAT ? 4 : 2;
  for (int i = 0; i < INPUTS; ++i)
    run->values[pointers[i]].pointer = (uint64_t)part_data(
        &run->x[i], type->ranks[i], first, type->inputs[i] == 'T' ? element : 4);
  run->values[ARG_o_ptr].pointer = (uint64_t)part_data(&run->outputs[OUTPUT], 4, first, element);
  run->values[ARG_lse_ptr].pointer = (uint64_t)part_data(&run->outputs[LSE], 3, first, 4);
}

static void set_arguments(Run *run) {
  const Node *node = run->node;
  const Tensor *x = run->x;
  Value *values = run->values;
  set_pointers(run, 0);
  STRIDES(x[QUERY], 4, ARG_q_sb, ARG_q_sh, ARG_q_sm);
  STRIDES(x[KEY], 4, ARG_k_sb, ARG_k_sh, ARG_k_sn);
  STRIDES(x[VALUE], 4, ARG_v_sb, ARG_v_sh, ARG_v_sn);
  STRIDES(run->outputs[OUTPUT], 4, ARG_o_sb, ARG_o_sh, ARG_o_sm);
  STRIDES(x[IDS], 4, ARG_ids_sb, ARG_ids_sh, ARG_ids_sn);
  STRIDES(x[COUNTS], 3, ARG_counts_sb, ARG_counts_sh);
  STRIDES(x[TAIL_KEY], 5, ARG_tail_k_sb, ARG_tail_k_sh, ARG_tail_k_sn, ARG_tail_k_sr);
  STRIDES(x[TAIL_VALUE], 5, ARG_tail_v_sb, ARG_tail_v_sh, ARG_tail_v_sn, ARG_tail_v_sr);
  STRIDES(x[TAIL_SIZE], 4, ARG_tail_size_sb, ARG_tail_size_sh, ARG_tail_size_sn);
  STRIDES(x[TAIL_VARIANCE], 4, ARG_tail_var_sb, ARG_tail_var_sh, ARG_tail_var_sr);
  STRIDES(x[TAIL_SLOPE], 5, ARG_slope_sb, ARG_slope_sh, ARG_slope_sn, ARG_slope_sd);
  /* representatives and slopes that all query blocks share */
  if (x[TAIL_KEY].sizes[2] == 1)
    values[ARG_tail_k_sn].integer = values[ARG_tail_v_sn].integer =
        values[ARG_tail_size_sn].integer = 0;
  if (x[TAIL_SLOPE].sizes[2] == 1) values[ARG_slope_sn].integer = 0;
  int64_t length_kv = x[KEY].sizes[2];
  values[ARG_heads].integer = x[QUERY].sizes[1];
  values[ARG_length_q].integer = x[QUERY].sizes[2];
  values[ARG_length_kv].integer = length_kv;
  values[ARG_blocks_q].integer = run->blocks_q;
  values[ARG_blocks_kv].integer = run->blocks_kv;
  values[ARG_max_blocks].integer = x[IDS].sizes[3];
  values[ARG_representatives].integer = x[TAIL_KEY].sizes[3];
  values[ARG_whole].integer = length_kv / node->block_kv;
  values[ARG_last_keys].integer = length_kv - (run->blocks_kv - 1) * node->block_kv;
  double scale = fabs((double)node->scale); /* products are rounded once */
  values[ARG_scale].number = scale;
  values[ARG_scale_log2].number = (scale == 0 ? 1 : scale) * M_LOG2E;
  values[ARG_half_weight_log2].number = node->variance_weight / 2.0 * M_LOG2E;
}

/* Maps of what the copy engine reads and writes; for a tail that is not read, of the keys. */
static Status *set_maps(Run *run, const Part *part) {
  const Tensor *x = run->x;
  const Kernel *kernels = VARIANTS[run->variant].kernels;
  int tailed = kernels[VARIANCE].code != NULL;
  Tensor tail_key = tailed ? without_third(&x[TAIL_KEY]) : x[KEY];
  Tensor tail_value = tailed ? without_third(&x[TAIL_VALUE]) : x[VALUE];
  Tensor slope = tailed ? without_third(&x[TAIL_SLOPE]) : x[KEY];
  const Tensor *mapped[] = {&x[QUERY], &x[KEY],     &x[VALUE], &run->outputs[OUTPUT],
                            &tail_key, &tail_value, &slope}; /* in the order of ARGUMENTS */
  for (int i = 0; i < kernels[PAIRED].map_count; ++i) {
    const Map *map = &kernels[PAIRED].maps[i];
    int which = (map->argument - ARG_q_desc) / MAP_ARGUMENTS;
    TRY(set_map(run->values, map, mapped[which], part, run->node->dtype));
  }
  return NULL;
}

/* As gluon_attention.heads_at_a_time. */
static int64_t heads_at_a_time(const Run *run) {
  const Kernel *kernels = VARIANTS[run->variant].kernels;
  int64_t made = divide_up(run->blocks_q, 2) * (2 * run->blocks_kv + 4 * PLAN);
  if (kernels[VARIANCE].code) made += 2 * run->blocks_q * run->blocks_kv;
  int64_t given = 2 * (run->blocks_q + 2 * run->blocks_kv) * run->node->block_kv *
                  run->x[QUERY].sizes[3];
  int64_t programs = divide_up(run->blocks_q, kernels[PAIRED].blocks) * run->batch_heads;
  int64_t parts = smaller(divide_up(SHARE * made, given), programs / FILL);
  return divide_up(run->batch_heads, larger(parts, 1));
}

/* As gluon_attention.attend: some of the heads at a time. */
static Status *launch_parts(Run *run, int64_t most) {
  int64_t batch = run->x[QUERY].sizes[0], heads = run->x[QUERY].sizes[1];
  int64_t samples = larger(most / heads, 1);
  uint64_t listed = run->values[ARG_listed_ptr].pointer;
  for (int64_t sample = 0; sample < batch; sample += samples)
    for (int64_t head = 0; head < heads; head += most) {
      Part part = {sample * heads + head, smaller(samples, batch - sample),
                   smaller(most, heads - head)};
      set_pointers(run, part.first);
      run->values[ARG_listed_ptr].pointer = listed + part.first * run->blocks_q * run->blocks_kv;
      run->values[ARG_heads].integer = part.heads;
      TRY(set_maps(run, &part));
      TRY(launch_some(run, ORDER, PAIRED, part.samples * part.heads));
    }
  return NULL;
}

static Status *sparse_attention(Run *run) {
  const Node *node = run->node;
  const Tensor *x = run->x;
  int has_tail = x[TAIL_KEY].sizes[3] > 0;
  const int key[KEY_SIZE] = {
      node->dtype, (int)x[QUERY].sizes[3], (int)x[VALUE].sizes[3], (int)node->block_q,
      (int)node->block_kv, (node->scale > 0) - (node->scale < 0), has_tail,
      has_tail && node->per_block, has_tail && x[TAIL_VARIANCE].sizes[2] > 0,
      has_tail ? (int)smaller(x[TAIL_SLOPE].sizes[2], 2) : 0,
      x[KEY].sizes[2] % node->block_kv == 0};
  TRY(find_variant(run, SPARSE_ATTENTION, key));
  int64_t batch = x[QUERY].sizes[0], heads = x[QUERY].sizes[1], length_q = x[QUERY].sizes[2];
  run->batch_heads = batch * heads;
  run->blocks_q = x[IDS].sizes[2];
  run->blocks_kv = divide_up(x[KEY].sizes[2], node->block_kv);
  if (has_tail && node->per_block &&
      (x[TAIL_KEY].sizes[2] != 1 || x[TAIL_KEY].sizes[3] != run->blocks_kv))
    return fail(STATUS_INVALID_ARGUMENT,
                "uta::SparseAttention: input %d must hold one representative for each of %lld key "
                "blocks, got %lld x %lld", TAIL_KEY, (long long)run->blocks_kv,
                (long long)x[TAIL_KEY].sizes[2], (long long)x[TAIL_KEY].sizes[3]);
  const Kernel *kernels = VARIANTS[run->variant].kernels;
  if (kernels[ORDER].code && run->blocks_kv > MAX_BLOCKS)
    return fail(STATUS_INVALID_ARGUMENT,
                "uta::SparseAttention: input %d must have at most %d blocks, got %lld", KEY,
                MAX_BLOCKS, (long long)run->blocks_kv);
  TRY(make_output(run, OUTPUT, 4, (int64_t[]){batch, heads, length_q, x[VALUE].sizes[3]}));
  TRY(make_output(run, LSE, 3, (int64_t[]){batch, heads, length_q}));
  if (batch * heads * length_q == 0) return NULL;
  TRY(begin(run));
  set_arguments(run);

  size_t bytes = 0, listed = 0, order = 0, plan = 0, sigma2 = 0;
  int64_t pairs = divide_up(run->blocks_q, 2), most = 0;
  int64_t marked = run->batch_heads * run->blocks_q * run->blocks_kv;
  if (kernels[MARK].code) listed = reserve(&bytes, marked);
  if (kernels[ORDER].code) {
    most = heads_at_a_time(run);
    order = reserve(&bytes, most * pairs * run->blocks_kv * (int64_t)sizeof(uint16_t));
    plan = reserve(&bytes, most * pairs * PLAN * (int64_t)sizeof(int32_t));
  }
  if (kernels[VARIANCE].code) sigma2 = reserve(&bytes, most * run->blocks_q * run->blocks_kv * 2);
  TRY(take_workspace(run, bytes));
  run->values[ARG_listed_ptr].pointer = (uint64_t)run->memory + listed;
  run->values[ARG_order_ptr].pointer = (uint64_t)run->memory + order;
  run->values[ARG_plan_ptr].pointer = (uint64_t)run->memory + plan;
  run->values[ARG_sigma2_ptr].pointer = (uint64_t)run->memory + sigma2;
  if (kernels[MARK].code) TRY(fill(run, run->values[ARG_listed_ptr].pointer, 0, marked));
  TRY(launch_some(run, MARK, LISTED, run->batch_heads));
  return kernels[PAIRED].code ? launch_parts(run, most) : NULL;
}

/* ---- BlockStatistics ------------------------------------------------------------------------- */

/* As gluon_statistics.block_statistics, and the sum of its last result. */
static Status *block_statistics(Run *run) {
  enum { KEYS, VALUES };
  const Tensor *x = run->x;
  int64_t batch = x[KEYS].sizes[0], heads = x[KEYS].sizes[1], length = x[KEYS].sizes[2];
  int64_t dim = x[KEYS].sizes[3], dim_v = x[VALUES].sizes[3], batch_heads = batch * heads;
  int64_t blocks = divide_up(length, run->node->block_kv);
  TRY(find_variant(run, BLOCK_STATISTICS,
                   (int[KEY_SIZE]){run->node->dtype, (int)dim, (int)dim_v,
                                   (int)run->node->block_kv}));
  TRY(make_output(run, 0, 4, (int64_t[]){batch, heads, blocks, dim}));
  TRY(make_output(run, 1, 4, (int64_t[]){batch, heads, blocks, dim}));
  TRY(make_output(run, 2, 4, (int64_t[]){batch, heads, blocks, dim_v}));
  TRY(make_output(run, 3, 3, (int64_t[]){batch, heads, blocks}));
  TRY(make_output(run, 4, 4, (int64_t[]){batch, heads, dim, dim_v}));
  if (batch_heads * blocks == 0) return NULL;
  TRY(begin(run));
  int64_t parts = divide_up(blocks, divide_up(blocks * batch_heads, PROGRAMS));
  size_t bytes = 0, sums = reserve(&bytes, batch_heads * parts * dim * dim_v * 4);
  TRY(take_workspace(run, bytes));
  Value *values = run->values;
  static const int pointers[] = {ARG_k_mean_ptr, ARG_k_var_ptr, ARG_v_mean_ptr, ARG_v_var_ptr,
                                 ARG_total_ptr};
  for (int i = 0; i < 5; ++i) values[pointers[i]].pointer = (uint64_t)run->outputs[i].data;
  values[ARG_sums_ptr].pointer = (uint64_t)run->memory + sums;
  values[ARG_heads].integer = heads;
  values[ARG_length].integer = length;
  values[ARG_blocks].integer = blocks;
  values[ARG_blocks_per_program].integer = divide_up(blocks, parts);
  values[ARG_parts].integer = parts;
  values[ARG_size].integer = dim * dim_v;
  const Kernel *kernels = VARIANTS[run->variant].kernels;
  const Part whole = {0, batch, heads};
  for (int i = 0; i < kernels[POOL].map_count; ++i) {
    const Map *map = &kernels[POOL].maps[i];
    const Tensor *mapped = &x[map->argument == ARG_k_desc ? KEYS : VALUES];
    TRY(set_map(values, map, mapped, &whole, run->node->dtype));
  }
  TRY(launch(run, POOL, parts, batch_heads));
  return launch(run, SUM, divide_up(dim * dim_v, kernels[SUM].blocks), batch_heads);
}

/* ---- BlockScores ----------------------------------------------------------------------------- */

enum { MEAN = 1, SPREAD, SIZE };

/* As triton_scores.block_scores and gluon_scores.block_scores. */
static Status *block_scores(Run *run) {
  const Node *node = run->node;
  const Tensor *x = run->x;
  int64_t batch = x[QUERY].sizes[0], heads = x[QUERY].sizes[1], length_q = x[QUERY].sizes[2];
  int64_t blocks_q = divide_up(length_q, node->block_q), blocks = x[MEAN].sizes[2];
  float power = node->variance_power;
  const int key[KEY_SIZE] = {
      node->dtype, (int)x[QUERY].sizes[3], (int)blocks, (int)node->block_q, (int)node->rows,
      node->variance_weight != 0, power == 0 ? 0 : power == 0.5 ? 1 : power == 1 ? 2 : 3};
  TRY(find_variant(run, BLOCK_SCORES, key));
  TRY(make_output(run, 0, 4, (int64_t[]){batch, heads, blocks_q, blocks}));
  if (batch * heads * blocks_q * blocks == 0) return NULL;
  TRY(begin(run));
  Value *values = run->values;
  values[ARG_q_ptr].pointer = (uint64_t)x[QUERY].data;
  values[ARG_mean_ptr].pointer = (uint64_t)x[MEAN].data;
  values[ARG_var_ptr].pointer = (uint64_t)x[SPREAD].data;
  values[ARG_size_ptr].pointer = (uint64_t)x[SIZE].data;
  values[ARG_scores_ptr].pointer = (uint64_t)run->outputs[0].data;
  STRIDES(x[QUERY], 4, ARG_q_sb, ARG_q_sh, ARG_q_sm);
  STRIDES(x[MEAN], 4, ARG_mean_sb, ARG_mean_sh, ARG_mean_sn);
  STRIDES(x[SPREAD], 4, ARG_var_sb, ARG_var_sh, ARG_var_sn);
  STRIDES(x[SIZE], 3, ARG_size_sb, ARG_size_sh);
  values[ARG_heads].integer = heads;
  values[ARG_length_q].integer = length_q;
  values[ARG_blocks_q].integer = blocks_q;
  values[ARG_blocks].integer = blocks;
  values[ARG_scale].number = node->scale;
  values[ARG_scale_log2].number = node->scale * M_LOG2E;
  values[ARG_half_weight_log2].number = node->variance_weight / 2.0 * M_LOG2E;
  values[ARG_power].number = power;
  const Kernel *kernel = &VARIANTS[run->variant].kernels[SCORE];
  const Part whole = {0, batch, heads};
  for (int i = 0; i < kernel->map_count; ++i) {
    const Map *map = &kernel->maps[i];
    const Tensor *mapped = &x[map->argument == ARG_mean_desc ? MEAN : SPREAD];
    TRY(set_map(values, map, mapped, &whole, node->dtype));
  }
  return launch(run, SCORE, divide_up(length_q, kernel->blocks), batch * heads);
}

/* ---- SelectBlocks and SelectCounted ---------------------------------------------------------- */

/* As triton_selection.select_blocks. */
static Status *select_some(Run *run, int type, int64_t kept, int64_t rows) {
  const int64_t *sizes = run->x[0].sizes, blocks = sizes[3];
  TRY(find_variant(run, type, (int[KEY_SIZE]){run->node->dtype, (int)blocks, (int)rows}));
  if (VARIANTS[run->variant].key[1] == OPEN && blocks > PACKED_BLOCKS)
    return fail(STATUS_INVALID_ARGUMENT,
                "uta::%s: input 0 must have at most %d blocks in a row, got %lld",
                run->node->type->name, PACKED_BLOCKS, (long long)blocks);
  TRY(make_output(run, 0, 4, sizes));
  int64_t groups = sizes[0] * sizes[1] * sizes[2] / rows;
  if (groups * blocks == 0) return NULL;
  TRY(begin(run));
  Value *values = run->values;
  values[ARG_bits_ptr].pointer = (uint64_t)run->x[0].data;
  values[ARG_kept_ptr].pointer = (uint64_t)run->outputs[0].data;
  if (kept == rows * blocks)
    return fill(run, values[ARG_kept_ptr].pointer, 1, groups * rows * blocks);
  values[ARG_rows].integer = rows;
  values[ARG_blocks].integer = blocks;
  values[ARG_wanted].integer = kept;
  const Kernel *kernels = VARIANTS[run->variant].kernels;
  if (rows == 1) return launch(run, IN_ROW, groups, 1);

  int passes = run->node->dtype == TYPE_FLOAT ? PASSES_32 : PASSES_16;
  int64_t digits = 1 << divide_up(run->node->dtype == TYPE_FLOAT ? 32 : 16, passes);
  int64_t turns = divide_up(divide_up(rows, SELECTED_ROWS), larger(SELECTING / groups, 1));
  int64_t share = turns * SELECTED_ROWS, programs = divide_up(rows, share);
  int64_t counted = groups * passes * digits * (int64_t)sizeof(int64_t);
  size_t bytes = 0, best = reserve(&bytes, groups * rows * (int64_t)sizeof(int32_t));
  size_t counts = reserve(&bytes, counted);
  size_t tied = reserve(&bytes, groups * digits * programs * (int64_t)sizeof(int32_t));
  TRY(take_workspace(run, bytes));
  values[ARG_best_ptr].pointer = (uint64_t)run->memory + best;
  values[ARG_digits_ptr].pointer = (uint64_t)run->memory + counts;
  values[ARG_tied_ptr].pointer = (uint64_t)run->memory + tied;
  values[ARG_wanted].integer = kept - rows;
  values[ARG_share].integer = share;
  values[ARG_programs].integer = programs;
  TRY(fill(run, values[ARG_digits_ptr].pointer, 0, counted));
  for (int which = FIRST; which <= KEEP; ++which)
    if (kernels[which].code) TRY(launch(run, which, groups * programs, 1));
  return NULL;
}

static Status *select_blocks(Run *run) {
  return select_some(run, SELECT_BLOCKS, run->node->kept, run->node->rows);
}

static Status *select_counted(Run *run) {
  const int64_t *sizes = run->x[0].sizes, all = sizes[1] * sizes[2];
  int64_t kept = *(const int64_t *)run->x[1].data, rows = *(const int64_t *)run->x[2].data;
  if (rows < 1 || all % rows || kept < rows || kept > rows * sizes[3])
    return fail(STATUS_INVALID_ARGUMENT,
                "uta::SelectCounted: %lld blocks for every %lld rows are no budget for %lld rows of "
                "%lld blocks", (long long)kept, (long long)rows, (long long)all,
                (long long)sizes[3]);
  return select_some(run, SELECT_COUNTED, kept, rows);
}

/* ---- ListBlocks ------------------------------------------------------------------------------ */

/* As triton_selection.list_blocks. */
static Status *list_blocks(Run *run) {
  const int64_t *sizes = run->x[0].sizes;
  int64_t rows = sizes[0] * sizes[1] * sizes[2];
  TRY(find_variant(run, LIST_BLOCKS, (int[KEY_SIZE]){run->node->dtype, (int)sizes[3]}));
  TRY(make_output(run, 0, 4, sizes));
  TRY(make_output(run, 1, 3, sizes));
  if (rows == 0) return NULL;
  TRY(begin(run));
  Value *values = run->values;
  values[ARG_kept_ptr].pointer = (uint64_t)run->x[0].data;
  values[ARG_ids_ptr].pointer = (uint64_t)run->outputs[0].data;
  values[ARG_counts_ptr].pointer = (uint64_t)run->outputs[1].data;
  values[ARG_rows].integer = rows;
  values[ARG_blocks].integer = sizes[3];
  return launch(run, LIST, divide_up(rows, VARIANTS[run->variant].kernels[LIST].blocks), 1);
}

/* ---- FitTail --------------------------------------------------------------------------------- */

/* As triton_fitting.fit_tail. */
static Status *fit_tail(Run *run) {
  enum { EXACT = 3, KEY_COUNTS, KEY_MEAN, KEY_VARIANCE, VALUE_MEAN, LOG_SIZE, SLOPE };
  const Node *node = run->node;
  const Tensor *x = run->x;
  const int64_t *sizes = x[QUERY].sizes;
  int64_t batch_heads = sizes[0] * sizes[1], length_q = sizes[2], dim = sizes[3];
  int64_t length_kv = x[KEY].sizes[2], dim_v = x[VALUE].sizes[3];
  const int key[KEY_SIZE] = {
      node->dtype, (int)dim, (int)dim_v, (int)node->block_q, (int)node->block_kv,
      x[KEY_COUNTS].sizes[2] > 0};
  TRY(find_variant(run, FIT_TAIL, key));
  if (length_q * length_kv == 0)
    return fail(STATUS_INVALID_ARGUMENT, "uta::FitTail: inputs 0 and 1 must have tokens");
  int64_t blocks = divide_up(length_kv, node->block_kv);
  if (x[EXACT].sizes[3] != blocks)
    return fail(STATUS_INVALID_ARGUMENT,
                "uta::FitTail: input %d must have a column for each of %lld key blocks, got %lld",
                EXACT, (long long)blocks, (long long)x[EXACT].sizes[3]);
  TRY(make_output(run, 0, 2, sizes));
  TRY(make_output(run, 1, 2, sizes));
  if (batch_heads == 0) return NULL;
  TRY(begin(run));
  int64_t every = larger(blocks / FIT_BLOCKS, 1), sampled = blocks / every;
  int64_t parts = smaller(FIT_PROGRAMS / batch_heads, sampled * node->block_kv / FIT_KEYS);
  int64_t per_program = divide_up(sampled, larger(parts, 1));
  parts = divide_up(sampled, per_program);
  int64_t element = node->dtype == TYPE_FLOAT ? 4 : 2, rows = node->rows;
  size_t bytes = 0, square = reserve(&bytes, batch_heads * rows * dim * 4);
  size_t seen = reserve(&bytes, batch_heads * parts * 3 * rows * dim_v * element);
  size_t masses = reserve(&bytes, batch_heads * parts * 4 * rows * 4);
  TRY(take_workspace(run, bytes));
  Value *values = run->values;
  static const int pointers[] = {ARG_q_ptr, ARG_k_ptr, ARG_v_ptr, ARG_exact_ptr, ARG_counts_ptr,
                                 ARG_k_mean_ptr, ARG_k_var_ptr, ARG_v_mean_ptr, ARG_size_ptr,
                                 ARG_slope_ptr};
  for (int i = 0; i <= SLOPE; ++i) values[pointers[i]].pointer = (uint64_t)x[i].data;
  values[ARG_square_ptr].pointer = (uint64_t)run->memory + square;
  values[ARG_values_ptr].pointer = (uint64_t)run->memory + seen;
  values[ARG_masses_ptr].pointer = (uint64_t)run->memory + masses;
  values[ARG_mass_ptr].pointer = (uint64_t)run->outputs[0].data;
  values[ARG_gain_ptr].pointer = (uint64_t)run->outputs[1].data;
  STRIDES(x[QUERY], 4, ARG_q_sb, ARG_q_sh, ARG_q_sm);
  STRIDES(x[KEY], 4, ARG_k_sb, ARG_k_sh, ARG_k_sn);
  STRIDES(x[VALUE], 4, ARG_v_sb, ARG_v_sh, ARG_v_sn);
  STRIDES(x[LOG_SIZE], 3, ARG_size_sb, ARG_size_sh);
  values[ARG_heads].integer = sizes[1];
  values[ARG_length].integer = values[ARG_length_q].integer = length_q;
  values[ARG_length_kv].integer = length_kv;
  values[ARG_rows].integer = rows;
  values[ARG_blocks_per_program].integer = per_program;
  values[ARG_every].integer = every;
  values[ARG_parts].integer = parts;
  values[ARG_scale].number = node->scale;
  values[ARG_scale_log2].number = node->scale * M_LOG2E;
  values[ARG_half_weight_log2].number = node->variance_weight / 2.0 * M_LOG2E;
  TRY(launch(run, SQUARE, rows, batch_heads));
  TRY(launch(run, SAMPLE, parts, batch_heads));
  return launch(run, SOLVE, batch_heads, 1);
}

/* ---- All of them ----------------------------------------------------------------------------- */

#define FLOAT(name) {#name, 0, offsetof(Node, name)}
#define INTEGER(name) {#name, 1, offsetof(Node, name)}

static const NodeType TYPES[] = {
    [SPARSE_ATTENTION] = {"SparseAttention", "TTTIITTFTT", "TF", {4, 4, 4, 4, 3, 5, 5, 4, 4, 5},
                          {FLOAT(scale), FLOAT(variance_weight), INTEGER(block_q),
                           INTEGER(block_kv), INTEGER(per_block)}, sparse_attention},
    [BLOCK_STATISTICS] = {"BlockStatistics", "TT", "TTTFF", {4, 4}, {INTEGER(block_kv)},
                          block_statistics},
    [BLOCK_SCORES] = {"BlockScores", "TTTF", "S", {4, 4, 4, 3},
                      {FLOAT(scale), FLOAT(variance_weight), FLOAT(variance_power),
                       INTEGER(block_q), INTEGER(rows)}, block_scores},
    [SELECT_BLOCKS] = {"SelectBlocks", "T", "M", {4}, {INTEGER(kept), INTEGER(rows)},
                       select_blocks},
    [SELECT_COUNTED] = {"SelectCounted", "TNN", "M", {4, 1, 1}, {{0}}, select_counted},
    [LIST_BLOCKS] = {"ListBlocks", "M", "II", {4}, {{0}}, list_blocks},
    [FIT_TAIL] = {"FitTail", "TTTMITTTFF", "FF", {4, 4, 4, 4, 3, 4, 4, 4, 3, 4},
                  {FLOAT(scale), FLOAT(variance_weight), INTEGER(rows), INTEGER(block_q),
                   INTEGER(block_kv)}, fit_tail},
};

static Status *compute(void *state, void *context) {
  Run run = {.node = state, .context = context};
  for (size_t i = 0; i < strlen(run.node->type->inputs); ++i) TRY(read_input(&run, i));
  Status *status = run.node->type->run(&run);
  /* in the stream's order, like what ONNX Runtime's own kernels give back */
  if (run.memory) run.node->allocator->free(run.node->allocator, run.memory);
  return status;
}

static Status *create_kernel(const CustomOp *op, const Api *api, const void *info, void **kernel) {
  (void)api;
  Node *node = calloc(1, sizeof *node);
  if (!node) return fail(STATUS_FAIL, "uta: out of memory");
  node->type = &TYPES[op->type];
  node->dtype = op->dtype;
  Status *status = NULL;
  for (const Attribute *x = node->type->attributes; !status && x->name; ++x) {
    void *place = (char *)node + x->place;
    status = x->is_integer ? get_int_attribute(info, x->name, place)
                           : get_float_attribute(info, x->name, place);
  }
  if (!status) status = get_allocator(info, MEMORY_DEFAULT, &node->allocator);
  if (status)
    free(node);
  else
    *kernel = node;
  return status;
}

static void destroy_kernel(void *kernel) {
  release_allocator(((Node *)kernel)->allocator);
  free(kernel);
}

/* ---- What ONNX Runtime asks about the operator ----------------------------------------------- */

static const char *get_name(const CustomOp *op) { return TYPES[op->type].name; }
static const char *get_provider(const CustomOp *op) { (void)op; return PROVIDER; }
static size_t get_input_count(const CustomOp *op) { return strlen(TYPES[op->type].inputs); }
static size_t get_output_count(const CustomOp *op) { return strlen(TYPES[op->type].outputs); }
static int type_of(char letter, int dtype) {
  switch (letter) {
    case 'F': return TYPE_FLOAT;
    case 'I': return TYPE_INT32;
    case 'N': return TYPE_INT64;
    case 'S': return dtype == TYPE_FLOAT ? TYPE_FLOAT : TYPE_BFLOAT16;
    case 'M': return TYPE_BOOL;
    default: return dtype;
  }
}
static int get_input_type(const CustomOp *op, size_t index) {
  return type_of(TYPES[op->type].inputs[index], op->dtype);
}
static int get_output_type(const CustomOp *op, size_t index) {
  return type_of(TYPES[op->type].outputs[index], op->dtype);
}
static int get_characteristic(const CustomOp *op, size_t index) {
  (void)op, (void)index;
  return INPUT_REQUIRED;
}
static int get_memory_type(const CustomOp *op, size_t index) {
  return TYPES[op->type].inputs[index] == 'N' ? MEMORY_OF_CPU_INPUT : MEMORY_DEFAULT;
}
static int get_start_version(const CustomOp *op) { (void)op; return 1; }
static int get_end_version(const CustomOp *op) { (void)op; return INT32_MAX; }
/* The types of nodes that run by this library, and the architecture that its kernels are for: for
   who opens a session with it. */
__attribute__((visibility("default"))) const char *uta_nodes(void) { return NODES; }
__attribute__((visibility("default"))) const char *uta_architecture(void) { return ARCHITECTURE; }

/* The entry that ONNX Runtime looks for. */
__attribute__((visibility("default"))) Status *RegisterCustomOps(void *options,
                                                                 const ApiBase *base) {
  static CustomOp ops[OPERATOR_COUNT];
  static void *domain = NULL;
  const Api *api = base->get_api(API_VERSION);
  if (!api) return NULL; /* older than 1.22: it has said so itself */
  bind_api(api);
  for (int i = 0; i < OPERATOR_COUNT; ++i)
    ops[i] = (CustomOp){
        .version = API_VERSION, .get_name = get_name, .get_provider = get_provider,
        .get_input_type = get_input_type, .get_input_count = get_input_count,
        .get_output_type = get_output_type, .get_output_count = get_output_count,
        .destroy = destroy_kernel, .get_input_characteristic = get_characteristic,
        .get_output_characteristic = get_characteristic, .get_input_memory_type = get_memory_type,
        .create_kernel_v2 = create_kernel, .compute_v2 = compute,
        .get_start_version = get_start_version, .get_end_version = get_end_version,
        .type = OPERATORS[i].type, .dtype = OPERATORS[i].dtype};
  pthread_mutex_lock(&lock);
  Status *status = NULL;
  if (!domain) { /* sessions share it: it lives as long as the library */
    status = create_custom_op_domain("uta", &domain);
    for (int i = 0; !status && i < OPERATOR_COUNT; ++i)
      status = custom_op_domain_add(domain, &ops[i]);
  }
  pthread_mutex_unlock(&lock);
  return status ? status : add_custom_op_domain(options, domain);
}
