"""Text and pictures to what the model reads: the prompts, the ids and the pixels of training.

This file belongs to the folder it lies in and imports torch and transformers alone. Load it with
``AutoProcessor.from_pretrained(folder, trust_remote_code=True)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import PILImageResampling, load_image

IMAGE_TAG = "<ImageHere>"
"""Stands in a text once per image."""
IMAGE_PROMPT = f"<Img>{IMAGE_TAG}</Img>"
_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")
_MAX_WORDS = 50

Message = Mapping[str, Any]


class MiniGptProcessor(ProcessorMixin):
    """A tokenizer and the preparation of images.

    prompt_format   {"style": "training", "before", "after", "wrap", "end_sym"}: instruction template and end symbol;
                    {"style": "turns", "first", "later", "lead", "end_sym"}: texts of a tokenizer's chat template,
                    before and after the first and every later question, in front of an answer and behind it;
                    {"style": "chat", "system", "user", "assistant", "sep"}: text of a published chat.
    question_text   how questions are cleaned: "identity" or "blip_caption" (lower case, some punctuation to spaces).
    end_token_ids   ids that end an answer.
    stop            texts that end an answer besides them.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        image_size: int = 224,
        image_mean: Sequence[float] = (0.0, 0.0, 0.0),
        image_std: Sequence[float] = (1.0, 1.0, 1.0),
        num_image_tokens: int = 1,
        image_token_id: int = -1,
        bos_token_id: int | None = None,
        end_token_ids: Sequence[int] = (2,),
        pad_token_id: int = 0,
        prompt_format: Mapping[str, Any] | None = None,
        question_text: str = "identity",
        stop: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.num_image_tokens, self.image_token_id = num_image_tokens, image_token_id
        self.bos_token_id, self.pad_token_id = bos_token_id, pad_token_id
        self.end_token_ids = list(end_token_ids)
        self.prompt_format = dict(prompt_format or {"style": "training", "before": "", "after": "", "wrap": False})
        self.question_text = question_text
        self.stop = list(stop)
        super().__init__(tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        """What the model is called with."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str | None = None,
        padding_side: str = "left",
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts that are rendered already, with ``<ImageHere>`` where an image stands, and their images in order.

        The ids start with BOS; each text between images is tokenised on its own. A conversation is rendered by
        ``apply_chat_template``. Raises ValueError when the number of images is not that of the tags.
        """
        texts = [] if text is None else [text] if isinstance(text, str) else list(text)
        pictures = _flat(images)
        tags = sum(item.count(IMAGE_TAG) for item in texts)
        if texts and tags != len(pictures):
            raise ValueError(f"the text holds {tags} x {IMAGE_TAG}, {len(pictures)} images are given")
        rows = [[*self._bos(), *self._segments(item)] for item in texts]
        return self._batch(rows, pictures, padding, padding_side, return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        padding: bool | str | None = None,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> Any:
        """Messages {"role": "user" | "assistant", "content": ...} up to the place where the next answer starts.

        There is one format, that of training: ``chat_template`` must be None.
        Content is a text or a list of {"type": "image", "image": ...} and {"type": "text", "text": ...}. Several
        conversations make a batch. Returns text, or ids (``tokenize``), or all inputs (``tokenize``, ``return_dict``).
        """
        if chat_template is not None:
            raise ValueError("this processor has the prompt format of training and takes no chat_template")
        many: Any = conversation if conversation and not isinstance(conversation[0], Mapping) else [conversation]
        parts = [self._parts(messages) for messages in many]
        if not tokenize:
            texts = ["".join(text for _, text in part) for part in parts]
            return texts if many is conversation else texts[0]
        rows = []
        for part in parts:
            rows.append([i for starts, text in part for i in (*(self._bos() if starts else []), *self._segments(text))])
        pictures = [image for messages in many for message in messages for image in _images_of(message)]
        batch = self._batch(rows, pictures, padding, padding_side, return_tensors)
        return batch if return_dict else batch["input_ids"]

    def post_process_image_text_to_text(self, generated_outputs: Any, **kwargs: Any) -> list[str]:
        """Answers of generated ids [B, new]: up to the end token or a stop text, without role markers and edges."""
        return [self._answer(row) for row in torch.as_tensor(generated_outputs).tolist()]

    def _answer(self, ids: list[int]) -> str:
        end = next((place for place, i in enumerate(ids) if i in self.end_token_ids), len(ids))
        kept = [i for i in ids[:end] if i != self.image_token_id]
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for marker in self.stop:
            text = text.split(marker)[0]
        return text.split("Assistant:")[-1].split("[/INST]")[-1].strip()

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """Pictures (or their paths, or addresses) -> [N, 3, S, S]: squashed to a square, bicubic, normalised."""
        side = self.image_size
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        rows = []
        for image in images:
            picture = load_image(image) if isinstance(image, str) else image
            rgb = picture.convert("RGB").resize((side, side), PILImageResampling.BICUBIC)
            raw = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(side, side, 3)
            rows.append(raw.permute(2, 0, 1).contiguous().float().div_(255).sub_(mean).div_(std))
        return torch.stack(rows)

    def _parts(self, messages: Sequence[Message]) -> list[tuple[bool, str]]:
        """Texts that are tokenised one by one, and whether BOS stands before each."""
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("the last message must be the user's: its answer is what the model generates")
        if self.prompt_format["style"] == "chat":
            return [(True, self._chat_text(messages))]
        if self.prompt_format["style"] == "turns":
            return self._turns(messages)
        parts: list[tuple[bool, str]] = []
        is_conversation = len(messages) > 1
        for message in messages:
            if message["role"] == "user":
                parts.append((True, self._wrapped(self._user_text(message) + " ", is_conversation)))
            elif message["role"] == "assistant":
                parts.append((False, _answer_of(message) + self.prompt_format.get("end_sym", "")))
            else:
                raise ValueError(f"unknown role '{message['role']}'; known: user, assistant")
        return parts

    def _turns(self, messages: Sequence[Message]) -> list[tuple[bool, str]]:
        shape = self.prompt_format
        parts: list[tuple[bool, str]] = []
        for message in messages:
            if message["role"] == "user":
                before, after = shape["later" if parts else "first"]
                parts.append((False, before + self._user_text(message).strip() + after))
            elif message["role"] == "assistant":
                parts.append((False, shape["lead"] + _answer_of(message).strip() + shape["end_sym"]))
            else:
                raise ValueError(f"unknown role '{message['role']}'; known: user, assistant")
        return parts

    def _wrapped(self, prompt: str, is_conversation: bool) -> str:
        shape = self.prompt_format
        return f"{shape['before']}{prompt}{shape['after']}" if shape["wrap"] or is_conversation else prompt

    def _chat_text(self, messages: Sequence[Message]) -> str:
        shape = self.prompt_format
        text = str(shape["system"] + shape["sep"])
        for message in messages:
            if message["role"] == "user":
                text += shape["user"] + self._user_text(message) + shape["sep"] + shape["assistant"]
            elif message["role"] == "assistant":
                text += _answer_of(message) + shape["sep"]
            else:
                raise ValueError(f"unknown role '{message['role']}'; known: user, assistant")
        return text

    def _user_text(self, message: Message) -> str:
        question = _text_of(message)
        if IMAGE_TAG in question:
            raise ValueError(
                f"a question must not hold {IMAGE_TAG}, which stands for a picture; give the picture instead"
            )
        return f"{IMAGE_PROMPT} " * len(_images_of(message)) + self.clean(question)

    def clean(self, question: str) -> str:
        """A question in the form of training."""
        if self.question_text == "identity":
            return question
        cleaned = _SPACES.sub(" ", _PUNCTUATION.sub(" ", question.lower()))
        return " ".join(cleaned.rstrip("\n").strip(" ").split(" ")[:_MAX_WORDS])

    def _bos(self) -> list[int]:
        return [] if self.bos_token_id is None else [self.bos_token_id]

    def _segments(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, segment in enumerate(text.split(IMAGE_TAG)):
            ids += [self.image_token_id] * (self.num_image_tokens if number else 0)
            ids += self.tokenizer.encode(segment, add_special_tokens=False) if segment else []
        return ids

    def _batch(
        self,
        rows: list[list[int]],
        pictures: Sequence[Any],
        padding: bool | str | None,
        padding_side: str,
        return_tensors: str | None,
    ) -> BatchFeature:
        data: dict[str, Any] = {}
        if rows:
            longest = max(map(len, rows)) if padding or (padding is None and len(rows) > 1) else 0
            fill = [max(0, longest - len(row)) for row in rows]
            masks = [[1] * len(row) for row in rows]
            if padding_side == "left":
                data["input_ids"] = [[self.pad_token_id] * n + row for n, row in zip(fill, rows, strict=True)]
                data["attention_mask"] = [[0] * n + mask for n, mask in zip(fill, masks, strict=True)]
            else:
                data["input_ids"] = [row + [self.pad_token_id] * n for n, row in zip(fill, rows, strict=True)]
                data["attention_mask"] = [mask + [0] * n for n, mask in zip(fill, masks, strict=True)]
        if pictures:
            data["pixel_values"] = self.pixels(pictures)
        return BatchFeature(data, tensor_type=return_tensors)


def _flat(images: Any) -> list[Any]:
    """Pictures of a batch, given one, as a list, or as lists per text."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [picture for item in images for picture in (item if isinstance(item, (list, tuple)) else [item])]


def _images_of(message: Message) -> list[Any]:
    content = message["content"]
    items = [] if isinstance(content, str) else [item for item in content if item["type"] == "image"]
    names = ("image", "path", "url")
    return [next(item[name] for name in names if item.get(name) is not None) for item in items]


def _answer_of(message: Message) -> str:
    return _text_of(message).replace(IMAGE_TAG, "")  # only a question shows a picture


def _text_of(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(str(item["text"]) for item in content if item["type"] == "text")
