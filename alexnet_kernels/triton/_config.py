"""The launch constants of the Triton kernels. They are fixed: nothing is tuned at run time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A launch over one dimension: how many elements or vectors a program takes."""

    block: int
    num_warps: int = 4


@dataclass(frozen=True)
class MatrixTile:
    """A program's tile of a matrix."""

    rows: int
    columns: int
    num_warps: int = 4


@dataclass(frozen=True)
class ProductTile:
    """A program's tile of a matrix product, whose sum takes `terms` terms a step."""

    rows: int
    columns: int  # at most
    terms: int
    num_warps: int
    num_stages: int


# Vectors of channels (_channels.py): one a thread, since the values of a vector and its halo take about 100 registers.
VECTORS = Launch(block=128)
SCALARS = Launch(block=512)  # four a thread
# Eight elements a thread: 16 bytes of half precision.
ELEMENTS = Launch(block=1024)

# Windows of more taps are loops. Unrolling saves address arithmetic but lengthens compilation.
UNROLLED_TAPS = 25

# Backward of pooling takes blocks of stride x stride pixels where a thread's registers hold their sums: of 8 channels,
# or, with the normalisation, of 8 and a halo beside their activations.
POOL_BLOCK_PIXELS = 9
LRN_POOL_BLOCK_PIXELS = 4
# Forward with the normalisation takes two neighbouring windows of up to so many taps if they overlap.
LRN_POOL_TILE_TAPS = 9

# Convolution. 128 x 128 with 64 terms is a tile at which wgmma and mma.sync come near their peak. Three stages of it,
# with the operand of ReLU's mask, take 112 kB of shared memory, which data center GPUs have. Unmeasured.
CONV_HALF = ProductTile(rows=128, columns=128, terms=64, num_warps=8, num_stages=3)
CONV_HALF_SHARED_BYTES = 128 << 10
# The gradient of the weight also holds a step of the masked output's gradient in registers, to sum it for the bias.
CONV_HALF_WEIGHT = ProductTile(rows=128, columns=128, terms=32, num_warps=8, num_stages=3)
# For GPUs with less shared memory: fits 64 kB.
CONV_HALF_SMALL = ProductTile(rows=64, columns=64, terms=32, num_warps=4, num_stages=2)
# Without tensor cores the operands of FMAs are in registers: larger tiles spill.
CONV_FLOAT = ProductTile(rows=64, columns=64, terms=16, num_warps=4, num_stages=2)
# The gradient of the weight sums over all pixels, in splits: enough for four programs on each of 132 multiprocessors,
# of at least 1024 pixels, so that writing and adding the splits stays cheap. They do not depend on the GPU, so that
# results do not either.
CONV_SPLIT_PROGRAMS = 528
CONV_SPLIT_PIXELS = 1024
# Adding the splits: small blocks for many programs, and many splits at a time, whose loads overlap.
CONV_ADD = Launch(block=128)
CONV_ADD_SPLITS = 16

# Batch normalisation, over the matrix of pixels by channels. The dimension that is contiguous in memory takes whole
# cache lines: 64 channels in channels_last, 512 pixels in NCHW.
BATCH_NORM_CHANNELS_LAST = MatrixTile(rows=32, columns=64)
BATCH_NORM_CONTIGUOUS = MatrixTile(rows=512, columns=2)
# Pixels of a part. The moments read a part twice: 64 channels of it are 128 kB of bfloat16, which stay in the L2 cache.
BATCH_NORM_PART = 1024
# Combining the parts, rows being parts: few channels for many programs, and many parts at a time, whose loads overlap.
BATCH_NORM_COMBINE = MatrixTile(rows=64, columns=16)

# Dropout. In pairs of quads: eight elements a thread, 16 bytes of half precision.
DROPOUT_PAIRS = Launch(block=128)
DROPOUT_ELEMENTS = Launch(block=512)
# Rows of fewer elements, a quarter of a program, are computed element by element.
DROPOUT_SHORT_ROW = 256

# Tensors of one launch. The kernel has the code of the step once, and up to four pointers, for each. AlexNet has 16.
SGD_TENSORS = 32
