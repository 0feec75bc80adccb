"""Everything the doctor looks for: one line each, with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)
"""error: training would stop, or learn or measure nonsense. warning: probably not meant. note: good to know."""


@dataclass(frozen=True)
class Check:
    """title: what was found. advice: what to do, or why it matters."""

    severity: str
    title: str
    advice: str


CHECKS = {
    "annotations": Check(ERROR, "the data set cannot be read", "nothing of it was examined; correct this first"),
    "section-unknown": Check(ERROR, "a chosen section is not in the file", "correct build_info.subsets_prompts"),
    "record-unusable": Check(ERROR, "no turns can be made of the record", "correct or remove it; see the message"),
    "image-missing": Check(ERROR, "picture not found", "check image_path, image_names and the name in the record"),
    "image-empty": Check(ERROR, "picture file of zero bytes", "copy or download it again"),
    "image-unreadable": Check(ERROR, "picture cannot be opened", "copy or download it again, or convert it"),
    "image-truncated": Check(ERROR, "picture is cut off or damaged", "copy or download it again"),
    "image-bomb": Check(ERROR, "picture too large to be opened safely", "scale it down; Pillow refuses to open it"),
    "image-tags": Check(ERROR, "image tags and pictures differ in number", "one tag per picture, or none at all"),
    "answer-empty": Check(ERROR, "empty answer", "an empty answer teaches to say nothing; remove the record"),
    "box-order": Check(ERROR, "box with its corners in the wrong order", "x1 < x2 and y1 < y2; width and height > 0"),
    "box-outside": Check(ERROR, "box outside the picture", "box text is in percents, 0 to 100; `box` in pixels"),
    "leak-same": Check(ERROR, "the same picture in training and validation", "validation would measure memory"),
    "leak-record": Check(ERROR, "the same record in training and validation", "validation would measure memory"),
    "leak-similar": Check(WARNING, "nearly the same picture in training and validation", "look at the pairs"),
    "record-duplicate": Check(WARNING, "identical records", "they weigh twice; remove one unless that is meant"),
    "answers-conflict": Check(WARNING, "different short answers to one question on one picture", "decide for one"),
    "answer-refusal": Check(WARNING, "the answer is a refusal", "the model would learn to refuse"),
    "answer-cut": Check(WARNING, "the answer loses its end to max_txt_len", "raise model.max_txt_len"),
    "prompt-cut": Check(WARNING, "the prompt loses its end to max_context_len", "raise model.max_context_len"),
    "placeholder": Check(WARNING, "a placeholder was left in the text", "fill it in where the file was made"),
    "special-token": Check(WARNING, "the answer spells a special token", "it is trained as that token, not as text"),
    "control-characters": Check(WARNING, "control characters in the text", "clean the text"),
    "mojibake": Check(WARNING, "wrongly decoded text, such as 'Ã©' for 'é'", "read the source file as UTF-8"),
    "box-clamped": Check(WARNING, "box reaches beyond the picture", "training cuts it at the border"),
    "box-empty": Check(WARNING, "box without area after rounding to percents", "too small to be learned"),
    "image-unused": Check(WARNING, "the picture is never shown", "the prompt holds no image tag"),
    "image-huge": Check(WARNING, "picture of more than 64 megapixels", "scale it down: decoding it slows training"),
    "image-tiny": Check(WARNING, "picture smaller than 32 pixels", "too little to see; scaled up it is blurred"),
    "image-aspect": Check(WARNING, "picture more than 5 times as long as wide", "it is squashed to a square; crop it"),
    "image-rotated": Check(
        WARNING, "picture is turned by its EXIF data", "training reads it unturned; save it upright"
    ),
    "image-alpha": Check(WARNING, "picture with transparency", "transparent parts show whatever colour lies below"),
    "image-16bit": Check(WARNING, "picture with more than 8 bits per channel", "it is clipped to 8 bits; convert it"),
    "image-cmyk": Check(NOTE, "picture in CMYK", "colours shift when it becomes RGB"),
    "image-palette": Check(NOTE, "picture with a palette", "it becomes RGB"),
    "not-examined": Check(NOTE, "records of this builder cannot be examined", "the doctor knows files and tar shards"),
}
"""Id -> check, in the order of reports."""
