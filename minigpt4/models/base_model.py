"""The vision-language model every architecture shares: embed, loss, generation, weights.

An architecture is two functions: ``vision_features`` (frozen: images to features) and ``project`` (what trains).
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from minigpt4.common.errors import CheckpointError
from minigpt4.common.schema import ModelConfig
from minigpt4.common.sharding import whole
from minigpt4.common.types import IMAGE_TOKEN, Batch
from minigpt4.conversation.encoding import Encoder
from minigpt4.models.lean import use_lean_layers
from minigpt4.models.llm import build_llm, causal_lm, check_llm, check_vocabulary, merge_lora
from minigpt4.models.load_report import (
    LoadReport,
    check_lora_settings,
    check_not_upcast,
    log_reports,
    match_weights,
)
from minigpt4.models.losses import LossOutput, per_sample, token_losses
from minigpt4.models.packing import Shape, choose
from minigpt4.models.probe import examine
from minigpt4.models.vision import build_vision, tower_file
from minigpt4.models.vision_key import vision_key
from minigpt4.models.weights import Weights, canonical_name, find_all, read_weights

log = logging.getLogger(__name__)


class BaseModel(nn.Module, ABC):
    """Vision tower, projection, causal LM. Frozen parts stay in eval mode and never build a graph."""

    Config: ClassVar[type[ModelConfig]] = ModelConfig

    def __init__(self, cfg: ModelConfig, device: torch.device, dtype: torch.dtype, reads_vision: bool = True) -> None:
        super().__init__()
        self.cfg = cfg
        self.device, self.dtype = device, dtype
        self._encoder = Encoder.from_config(cfg, num_image_tokens=1)  # first: a bad tokenizer is told at once
        self._from_checkpoints: set[str] = set()  # names of tensors that load_weights brought
        self.is_sharded = False  # True: weights are split over ranks, which call the same modules in step
        self.reads_pixels = True  # False: the vision part was freed, features alone are understood
        self.load_reports: list[LoadReport] = []  # one per file of weights, in the order of loading
        self.vision_key = ""  # of the files and settings that decide the vision weights; see vision_key
        self.has_vision = reads_vision  # False: the tower is on the meta device until load_vision
        place = device if reads_vision else torch.device("meta")
        self.visual_encoder, self.vision, tower_report = build_vision(cfg, place, self.vision_dtype())
        self._check_tower()  # before the language model loads
        # eps 1e-5, float32, as in BLIP-2; other towers normalise their tokens themselves
        is_normed = self.vision.is_normed
        self.ln_vision: nn.Module = nn.Identity() if is_normed else nn.LayerNorm(self.vision.width, device=device)
        llm, llm_report = build_llm(cfg, device, dtype)
        self.llama_model: Any = llm
        use_lean_layers(llm)
        self.load_reports += [report for report in (tower_report, llm_report) if report is not None]
        with self.autocast():
            traits = examine(self._lm, cfg.llama_model)
        self.logit_shape = traits.logits
        self.attends_by_sample, self.keeps_samples_apart = traits.attends_by_sample, traits.keeps_samples_apart
        self.ends_narrow = traits.ends_narrow
        self.packing_backend = "per_sample"
        rows, self.hidden_size = self._lm.get_input_embeddings().weight.shape
        check_vocabulary(self._encoder, cfg.llama_model, int(rows))
        if cfg.freeze_vit:
            self.visual_encoder.requires_grad_(False)
            self.ln_vision.requires_grad_(False)

    @classmethod
    def from_config(
        cls,
        cfg: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
        is_vision_known: Callable[[str], bool] | None = None,
    ) -> Self:
        """Build, freeze, load ``cfg.ckpt``. ``dtype`` is that of frozen weights and of the arithmetic; what trains is
        float32. The projection and LoRA start from ``seed`` whatever was drawn before. On the meta device the model has
        shapes alone and reads no weights. Files are found, downloaded and looked through before the big ones are read.
        is_vision_known: asked with the ``vision_key`` of a frozen vision part; where it says True, the files of that
        part are read when pixels or tensors come for it, perhaps never. Raises ConfigError and CheckpointError."""
        initial = None
        key, reads_vision = "", True
        if device.type != "meta":
            cfg = replace(cfg, **find_all(cls.weight_files(cfg)))
            key = cls._vision_key(cfg)
            reads_vision = is_vision_known is None or not is_vision_known(key)
            check_llm(cfg, device, dtype)
            initial = cls._initial_weights(cfg, dtype) if cfg.ckpt else None
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = cls(cfg, device, dtype) if reads_vision else cls(cfg, device, dtype, reads_vision)
        if key and reads_vision and key != cls._vision_key(cfg):
            key = ""  # another file was put there meanwhile: what was read is not what the key says
        model.vision_key = key
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
                log.debug("%s trains: kept in float32", name)
        if initial is not None:
            report = model.load_weights(initial.tensors, cfg.ckpt)
            report.notes += check_lora_settings(cfg, initial)
        if device.type != "meta":
            check_not_upcast(model, cfg, dtype)
            log_reports(model.load_reports)
        model.eval()
        return model

    @classmethod
    def weight_files(cls, cfg: ModelConfig) -> dict[str, str]:
        """Key of ``model`` -> the file of weights it means: a path, a name in the weights folder, or a web address."""
        files = {"vit_weights": tower_file(cfg), "ckpt": cfg.ckpt}
        return {key: path for key, path in files.items() if path}

    @classmethod
    def vision_files(cls, cfg: ModelConfig) -> dict[str, str]:
        """Those of ``weight_files`` that hold the whole vision part, all of it frozen; else none."""
        return {key: path for key, path in cls.weight_files(cfg).items() if key == "vit_weights" and cfg.freeze_vit}

    @classmethod
    def _vision_key(cls, cfg: ModelConfig) -> str:
        # a class must say itself what its vision part is: it may build more than the class it derives from
        files = cls.vision_files(cfg) if "vision_files" in vars(cls) else {}
        return vision_key(cls, cfg, files) if files else ""

    def load_vision(self) -> None:
        """Reads the files of a vision part that was left out when the model was built. Raises CheckpointError when they
        are others by now: features are kept under the name of the former."""
        if self.has_vision:
            return
        self.has_vision, number = True, len(self.load_reports)
        self._load_vision()
        if self.vision_key != self._vision_key(self.cfg):
            files = ", ".join(self.vision_files(self.cfg).values())
            raise CheckpointError(f"{files}: changed since this run began; start it again")
        for parameter in self._vision_parameters():
            parameter.requires_grad_(False)
        log_reports(self.load_reports[number:])

    def _load_vision(self) -> None:
        self.visual_encoder, self.vision, report = build_vision(self.cfg, self.device, self.vision_dtype())
        self.visual_encoder.eval()
        self.load_reports += [] if report is None else [report]

    @classmethod
    def _initial_weights(cls, cfg: ModelConfig, dtype: torch.dtype) -> Weights:
        """``cfg.ckpt``, matched against the shapes of the model: what does not fit is told before big weights load."""
        weights = read_weights(Path(cfg.ckpt))
        check_lora_settings(cfg, weights)
        with torch.random.fork_rng(devices=[]):
            skeleton = cls(cfg, torch.device("meta"), dtype)
        skeleton._match(weights.tensors, cfg.ckpt, complete=False)
        return weights

    @abstractmethod
    def vision_features(self, images: Tensor) -> Tensor:
        """images [N, 3, S, S] -> features [N, P, C']: every frozen step, what a feature cache may store."""

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """features [N, P, C'] -> embeddings [N, P, D] in the LM's space: what trains."""

    @abstractmethod
    def projection_parameters(self) -> list[nn.Parameter]:
        """The parameters ``project`` uses; a batch without images adds zero times them to its loss."""

    @property
    def encoder(self) -> Encoder:
        """Text to ids for this model; picklable."""
        return self._encoder

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Mean of the tower's image normalisation."""
        return self.vision.mean

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Standard deviation of the tower's image normalisation."""
        return self.vision.std

    @property
    def _lm(self) -> Any:
        return causal_lm(self.llama_model)

    def _check_tower(self) -> None:
        """Raises ConfigError when the tower's patches do not fit the architecture; any number fits here."""

    def vision_dtype(self) -> torch.dtype:
        """Of the tower's weights."""
        named = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "auto": self.dtype}
        if not self.cfg.freeze_vit or self.device.type == "cpu":
            return torch.float32  # a tower that trains is a float32 master; half precision is slow on CPUs
        return named[self.cfg.vit_precision]

    def _make_encoder(self, num_image_tokens: int) -> None:
        self._encoder = replace(self._encoder, num_image_tokens=num_image_tokens)

    def train(self, mode: bool = True) -> Self:
        """Train mode for what trains; frozen parts stay in eval mode (no dropout, no stochastic depth)."""
        super().train(mode)
        for name, child in self.named_children():
            trains = any(parameter.requires_grad for parameter in child.parameters())
            # transformers only checkpoints layers that are in train mode.
            recomputes = name == "llama_model" and self.cfg.use_grad_checkpoint_llm
            child.train(mode and (trains or recomputes))
        return self

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Arithmetic in ``dtype``; nothing to do in float32. The meta device has no autocast: the CPU's flag is set."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast("cpu" if self.device.type == "meta" else self.device.type, self.dtype)

    def choose_packing_backend(self, wanted: str) -> str:
        """Settle how attention over packed rows is computed; returns why. Raises ConfigError if it cannot be so."""
        config = self._lm.config
        heads = int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        shape = Shape(heads, int(getattr(config, "num_key_value_heads", None) or heads), width)
        self.packing_backend, reason = choose(wanted, shape, self.device, self.dtype)
        return reason

    def encode_images(self, images: Tensor, order: Tensor | None = None) -> Tensor:
        """images [N, 3, S, S], or features [N, P, C'] -> embeddings [N, P, D]; with ``order`` [M] [M, P, D].

        A picture that stands at several places goes through the frozen parts and the projection once.
        """
        if images.dim() == 4:
            assert self.reads_pixels, "pixels given to a model whose vision part was freed"
            frozen = not self._trains_vision()
            if order is not None and not frozen:  # stochastic depth is drawn for every place
                images, order = images[order], None
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                images = self.vision_features(images)
        projected = self.project(images)
        return projected if order is None else projected[order]

    def _trains_vision(self) -> bool:
        return not self.cfg.freeze_vit or any(p.requires_grad for p in self._vision_parameters())

    def _vision_parameters(self) -> list[nn.Parameter]:
        return [*self.visual_encoder.parameters(), *self.ln_vision.parameters()]

    def embed(
        self,
        input_ids: Tensor,
        images: Tensor,
        num_image_positions: int,
        order: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """input_ids [R, T], images of all IMAGE_TOKEN positions in order -> embeddings [R, T, D].

        order, places: see ``Batch.image_order`` and ``Batch.image_places``; places that are not given are looked for.
        Raises ValueError naming both counts when positions and image features differ.
        """
        count = images.shape[0] if order is None else order.shape[0]
        found = count * self.encoder.num_image_tokens
        if found != num_image_positions:
            raise ValueError(
                f"{num_image_positions} image positions in the ids but {count} images give {found} features; "
                f"each image needs exactly {self.encoder.num_image_tokens} positions"
            )
        is_image = input_ids == IMAGE_TOKEN
        embeddings: Tensor = self._lm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if images.shape[0] == 0:
            if not (self.is_sharded or (torch.is_grad_enabled() and self._trains_vision())):
                return embeddings
            return embeddings.masked_scatter(is_image.unsqueeze(-1), self._unseen().to(embeddings.dtype))
        features = self.encode_images(images, order).to(embeddings.dtype)  # [N, P, D]
        if places is None:
            places = is_image.flatten().nonzero().flatten()
        # The gradient of masked_scatter would look for the places again.
        filled = embeddings.flatten(0, 1).index_copy(0, places, features.flatten(0, 1))
        return filled.view_as(embeddings)

    def _unseen(self) -> Tensor:
        """What a row without pictures scatters onto no position at all: the way of pictures, with gradients of zero.

        Ranks whose row has some expect it of all: of a tower that trains its gradients, of a split model its weights
        too, and a backward through every layer.
        """
        if not self.reads_pixels:
            return torch.stack([parameter.float().sum() for parameter in self.projection_parameters()])
        return self.encode_images(torch.zeros(1, 3, self.cfg.image_size, self.cfg.image_size, device=self.device))

    def hidden_states(
        self, embeddings: Tensor, position_ids: Tensor, lengths: Sequence[int], wanted: Tensor | None = None
    ) -> Tensor:
        """embeddings [R, T, D] -> last hidden states [R, T, D]; lengths of the samples, in order.

        With ``wanted`` [n], numbers of positions in R * T, theirs alone [n, D]: what the last layer of most families
        can leave out of the others is not computed.

        Samples packed into one row are kept apart by ``packed_attention``. Models that cannot be told the lengths get
        neither mask nor cache: transformers then reads the samples off ``position_ids`` (a cache or an all-ones mask
        would let them leak into each other). Right-padded rows, one sample each, need nothing: attention is causal.
        Raises ValueError for packed rows where samples would see each other.
        """
        options: dict[str, Any] = {}
        mask = None
        if len(lengths) != embeddings.shape[0]:
            if not self.keeps_samples_apart:
                raise ValueError(f"{self.cfg.llama_model}: samples of one packed row would see each other")
            options["position_ids"] = position_ids
            if self.attends_by_sample:
                options |= {"sample_lengths": tuple(lengths), "packing_backend": self.packing_backend}
                # Nobody reads this mask. Without one transformers looks for samples in position_ids, for which the
                # host waits for the GPU; one of four dimensions is handed through.
                mask = embeddings.new_zeros(1, 1, 1, 1)
        is_narrow = wanted is not None and self.ends_narrow and len(wanted) > 0
        if is_narrow:
            options["wanted"] = wanted
        output = self._lm.get_decoder()(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, **options)
        hidden: Tensor = output.last_hidden_state
        if wanted is None:
            return hidden
        return hidden[0] if is_narrow else hidden.flatten(0, 1)[wanted]

    def forward(self, batch: Batch) -> LossOutput:
        """Summed cross-entropy of the supervised positions; the head sees no other position."""
        with self.autocast():
            embeddings = self.embed(
                batch.input_ids, batch.images, batch.num_image_positions, batch.image_order, batch.image_places
            )
            hidden = self.hidden_states(embeddings, batch.position_ids, batch.lengths, batch.supervised)  # [n, D]
            targets = batch.labels.flatten()[batch.supervised + 1]  # [n]
            head = self._lm.get_output_embeddings()
            losses = token_losses(hidden, head, targets, shape=self.logit_shape)
        loss_sum = losses.sum()
        if batch.images.shape[0] == 0:  # keeps DDP's set of used parameters the same for text-only batches
            loss_sum = loss_sum + sum(0.0 * parameter.float().sum() for parameter in self.projection_parameters())
        return LossOutput(loss_sum, per_sample(losses.detach(), batch), batch.num_target_tokens)

    def merge_lora(self) -> None:
        """Fold the adapters into the language model, for answers alone: such a model neither trains nor is saved.

        Quantised weights keep their adapters.
        """
        self.llama_model, obstacle = merge_lora(self.llama_model)
        log.info("LoRA: %s", f"kept beside the weights: {obstacle}" if obstacle else "folded into the weights")

    def trainable_parameters_by_name(self) -> list[tuple[str, nn.Parameter]]:
        """(published name, parameter) of everything that trains, in a stable order."""
        return [(canonical_name(n), p) for n, p in self.named_parameters() if p.requires_grad]

    def frozen_without_file(self) -> list[tuple[str, nn.Parameter]]:
        """Frozen tensors that only this run has, or only the checkpoint it began with: they belong into checkpoints.

        A randomly built tower; a tower that an earlier stage trained and ``cfg.ckpt`` brought.
        """
        parts: tuple[str, ...] = ()
        if self.cfg.vit_weights == "random" and self.cfg.freeze_vit:
            parts += ("visual_encoder.", "ln_vision.")
        if self.cfg.llama_weights == "random" and self.cfg.freeze_llm:
            parts += ("llama_model.",)
        frozen = ((name, parameter) for name, parameter in self.named_parameters() if not parameter.requires_grad)
        named = ((canonical_name(name), name, parameter) for name, parameter in frozen)
        return [(known, p) for known, name, p in named if name.startswith(parts) or known in self._from_checkpoints]

    def trainable_state(self, is_kept: bool = True) -> dict[str, Tensor]:
        """What a checkpoint stores: published name -> CPU copy. Of a split model every rank must ask; those that
        say ``is_kept`` False help to gather and get nothing."""
        state = {}
        for name, parameter in [*self.trainable_parameters_by_name(), *self.frozen_without_file()]:
            value = whole(parameter.detach())
            if is_kept:
                state[name] = value.to("cpu", copy=True).contiguous()
        return state

    def load_weights(self, state: Mapping[str, Tensor], source: str, complete: bool = False) -> LoadReport:
        """Copy the tensors of a file in; see ``match_weights`` for what is an error. Returns the report, kept too."""
        values, report = self._match(state, source, complete)
        vision = {id(parameter) for parameter in self._vision_parameters()}
        if any(canonical_name(name) in values for name, p in self.named_parameters() if id(p) in vision):
            self.load_vision()
            self.vision_key = ""  # other values than those of its files
        parameters = {canonical_name(name): p for name, p in self.named_parameters()}
        self._from_checkpoints |= set(values)
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value.to(parameters[name].device))
        self.load_reports.append(report)
        return report

    def _match(self, state: Mapping[str, Tensor], source: str, complete: bool) -> tuple[dict[str, Tensor], LoadReport]:
        parameters = {canonical_name(name): p for name, p in self.named_parameters()}
        trained = [name for name, _ in self.trainable_parameters_by_name()]
        return match_weights(parameters, trained, state, source, complete)
