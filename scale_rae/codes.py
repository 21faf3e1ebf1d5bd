"""Constants of quantised weights: the largest int8 value, NF4's values (QLoRA, arXiv 2305.14314), which blocks stay int8."""

INT8_LARGEST = 127.0
BLOCK = 64  # weights of a row that share a scale in nf4
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def block_kind(kind: str, block: int, blocks: int) -> str:
    """The form of a DiT block's attention and SwiGLU, of `blocks`, where the network is quantised as `kind`.

    nf4 keeps the first block and the last two in int8, whose errors reach the velocity least diminished: in the bundled model
    they make two thirds of its squared error.
    """
    return "int8" if kind == "nf4" and block in (0, blocks - 2, blocks - 1) else kind
