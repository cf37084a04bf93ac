"""How much of a file is read before it is refused: every limit has a sane default and is an option (`--limit`)."""

from pydantic import Field

from unplant.params import Config


class Limits(Config):
    """Limits on untrusted files; all are checked before anything of that size is allocated."""

    model_bytes: int = Field(default=8 * 2**30, ge=1, description="size of a model file")
    header_bytes: int = Field(default=16 * 2**20, ge=1, description="size of a safetensors header")
    pickle_bytes: int = Field(default=64 * 2**20, ge=1, description="size of a checkpoint's pickle, tensors aside")
    pickle_opcodes: int = Field(default=1_000_000, ge=1, description="instructions of that pickle")
    tensors: int = Field(default=100_000, ge=1, description="tensors in a model file")
    image_bytes: int = Field(default=200 * 2**20, ge=1, description="size of an image file")
    image_pixels: int = Field(default=50_000_000, ge=1, description="width times height of an image")
    images: int = Field(default=5_000_000, ge=1, description="images of a data set")
    data_bytes: int = Field(default=16 * 2**30, ge=1, description="size of all decoded images of a data set, in memory")


DEFAULT = Limits()
"""What is used where nobody says otherwise."""
