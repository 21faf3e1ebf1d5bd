"""Constants of weights as they run fast, on which sizes depend: widths, groups, NF4 (QLoRA, arXiv 2305.14314). No torch."""

INT8_LARGEST = 127.0
BLOCK = 64  # weights of a row that share a scale in nf4
PLAIN_AT_ONCE = 1 << 23  # weights that the plain form dequantises at once: 100 MB of float32 copies
PAD_TO = 64  # SwiGLU's inner width is a multiple of this on CUDA and where it is quantised
GROUP_ROWS = 2048  # rows (tokens of a batch's prompts) with which one block's adaLN product fills the GPU
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def attention_kind(kind: str) -> str:
    """The form of attention's linears where a network is quantised as `kind`: int8 with nf4, since errors there cost most."""
    return "int8" if kind == "nf4" else kind


def decoder_kind(kind: str | None) -> str | None:
    """The form of the linears of the pixel decoder's layers where the networks are quantised as `kind`: None for the dtype.

    int8 with nf4, where the decoder would be a fifth of all bytes. Pictures of the bundled model keep 48 dB and more (PSNR).
    """
    return "int8" if kind == "nf4" else None


def mlp_kind(kind: str, block: int, blocks: int) -> str:
    """The form of a DiT block's SwiGLU, of `blocks`, where the network is quantised as `kind`.

    With nf4, the first block and the last two are int8: their errors reach the velocity least diminished.
    """
    return "int8" if kind == "nf4" and block in (0, blocks - 2, blocks - 1) else kind
