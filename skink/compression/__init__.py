"""The main job: from a checkpoint to a smaller model, with a report of what it cost and what it gained."""

from skink.compression.compress import Compression, compress, compress_program
from skink.compression.folder import CompressOptions, compress_to_folder
from skink.compression.measure import SpeedOptions
from skink.compression.text_options import TextOptions, TrainingTextOptions

__all__ = [
    "CompressOptions",
    "Compression",
    "SpeedOptions",
    "TextOptions",
    "TrainingTextOptions",
    "compress",
    "compress_program",
    "compress_to_folder",
]
