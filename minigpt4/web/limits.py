"""What the page takes from a browser: bounds of pictures and questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from minigpt4.chat.session import open_image
from minigpt4.common.errors import ConfigError, DataError


@dataclass(frozen=True)
class Limits:
    """max_megabytes: of an uploaded file; max_megapixels: of its picture; max_characters: of a question.

    max_waiting: questions that may wait for the model; max_visits: browser tabs whose conversations are kept.
    """

    max_megabytes: int = 20
    max_megapixels: int = 50
    max_characters: int = 4000
    max_waiting: int = 20
    max_visits: int = 50

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be >= 1, got {value}")

    def open_upload(self, path: str | Path) -> Image.Image:
        """The picture of an uploaded file in RGB, upright as the browser shows it.

        Its size is read from the header before a pixel is decoded. Raises DataError without the server's path.
        """
        file = Path(path)
        try:
            megabytes = file.stat().st_size / 1e6
        except OSError as error:
            raise DataError("The upload did not arrive. Try again.") from error
        if megabytes > self.max_megabytes:
            raise DataError(f"The file has {megabytes:.1f} MB; at most {self.max_megabytes} MB are taken.")
        self._check_pixels(file)
        try:
            upright = ImageOps.exif_transpose(open_image(file))
        except DataError as error:
            raise DataError(f"'{file.name}' is damaged: it cannot be read as a picture to its end.") from error
        return _on_white(upright)

    def check_question(self, question: str) -> str:
        """``question`` without space around it. Raises DataError for one that is empty or too long."""
        text = question.strip()
        if not text:
            raise DataError("Write a question first.")
        if len(text) > self.max_characters:
            raise DataError(f"The question has {len(text):,} characters; at most {self.max_characters:,} are taken.")
        return text

    def _check_pixels(self, file: Path) -> None:
        try:
            with Image.open(file) as header:
                width, height = header.size
        except Image.DecompressionBombError as error:
            raise DataError(f"The picture is too large; at most {self.max_megapixels} megapixels are taken.") from error
        except (OSError, SyntaxError, ValueError) as error:  # UnidentifiedImageError is an OSError
            raise DataError(f"'{file.name}' is not a picture that can be read (JPEG, PNG, WebP, ...).") from error
        if width * height > self.max_megapixels * 1e6:
            raise DataError(
                f"The picture has {width:,} x {height:,} pixels; at most {self.max_megapixels} megapixels are taken."
            )


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; a transparent picture is laid on white, as the page shows it."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(ground, layer).convert("RGB")
