"""A teacher: a frozen net with its own label space, preprocessing and feature taps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import TeacherError
from pipeline.models.capture import Activations, captured, find_penultimate, module_at, pooled, watch
from pipeline.models.folding import fold_batch_norms
from pipeline.models.gathering import Rows
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.spec import PreprocessingSpec


class TeacherOutput(NamedTuple):
    """What a teacher says of a batch.

    Attributes
    ----------
    logits : (B, C_t) float32 tensor
        Over the teacher's own classes.
    features : (B, D) float32 tensor
        Penultimate.
    taps : dict of str to float32 tensor
        Outputs of inner modules.
    """

    logits: Tensor
    features: Tensor
    taps: dict[str, Tensor]


class Teacher(nn.Module):
    """A frozen net that takes stored images.

    It stays in evaluation mode whatever the module around it does, no parameter wants a gradient, and the statistics of
    its batch norms never move.

    Parameters
    ----------
    net : nn.Module
        Maps preprocessed images to logits (B, C_t), or to logits and features.
    name : str
    classes : sequence of str
        C_t names, in the order of the logits.
    preprocessing : PreprocessingSpec or None
        None: the net takes stored images itself.
    features : str, optional
        Path of the module whose input is the penultimate features; None: see `find_penultimate`.
    taps : mapping of str to str, optional
        Name to path of inner modules.
    has_modules : bool
        False for a net that is one opaque graph. Its features are the second output; where it has none, its logits.

    Raises
    ------
    TeacherError
        When a path does not exist, no penultimate features can be found, or the last layer's width is not C_t.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        classes: Sequence[str],
        preprocessing: PreprocessingSpec | None,
        features: str | None = None,
        taps: Mapping[str, str] | None = None,
        has_modules: bool = True,
    ) -> None:
        super().__init__()
        self.name = name
        self.classes = tuple(classes)
        self.net = net
        self.preprocessing = nn.Identity() if preprocessing is None else Preprocessing(preprocessing, _float_type(net))
        self.taps = dict(taps or {})
        self._features = features
        self._feature_dim: int | None = None
        self._has_modules, self._num_parameters = has_modules, sum(value.numel() for value in net.parameters())
        self._compiled: Callable[[Tensor], tuple[Any, Activations]] | None = None
        if has_modules:
            self._find_features()
        elif features is not None or self.taps:
            field = "features" if features is not None else "taps"
            raise self._error(f"`{field}` names a module, but its net is one opaque graph; have it return features")
        for tap, path in self.taps.items():
            self._module(path, f"taps.{tap}")
        self.requires_grad_(False)
        self.training = False
        self.preprocessing.eval()
        with suppress(NotImplementedError):  # what torch.export made has no modes
            net.eval()
        for module in net.modules():
            if type(module) is nn.Conv2d:  # which then runs channels last, up to 1.7 times as fast on a CPU
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    def _find_features(self) -> None:
        last = find_penultimate(self.net)
        found = self._features or last
        if found is None:
            raise self._error("its net has no linear layer; set `features` to the module that follows the features")
        module = self._module(found, "features")
        if isinstance(module, nn.Linear):
            if found == last and module.out_features != len(self.classes):
                raise self._error(
                    f"its last layer {found!r} has {module.out_features} outputs for {len(self.classes)} `classes`; "
                    "correct `classes`, or set `features` if another module follows the features"
                )
            self._feature_dim = module.in_features
        self._features = found

    def _module(self, path: str, field: str) -> nn.Module:
        try:
            return module_at(self.net, path)
        except ValueError as error:
            raise self._error(f"`{field}`: {error}") from None

    def _error(self, message: str) -> TeacherError:
        return TeacherError(f"teacher {self.name!r}: {message}")

    def train(self, mode: bool = True) -> Teacher:
        """Do nothing: a teacher does not learn."""
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(chain(self.net.parameters(), self.buffers()), torch.empty(0)).device

    @property
    def num_parameters(self) -> int:
        """Number of the net's parameters, as it was given."""
        return self._num_parameters

    @property
    def feature_dim(self) -> int | None:
        """D; None before the first batch where the net does not tell."""
        return self._feature_dim

    @property
    def classifier_weight(self) -> Tensor | None:
        """Rows of the last linear layer, (C_t, D); None where the features do not go straight into such a layer."""
        if self._features is None:
            return None
        module = self.net.get_submodule(self._features)
        if isinstance(module, nn.Linear) and module.out_features == len(self.classes):
            return module.weight.detach()
        return None

    def fold(self) -> Teacher:
        """Make it faster for good, see `fold_batch_norms`: for a teacher that is to look at images and no more.

        Its weights are no longer those of the file then, and inner modules that are no taps may show something else.
        """
        if self._has_modules:
            fold_batch_norms(self.net, outputs=set(self.taps.values()), inputs={self._features or ""})
        return self

    def compile_net(self) -> Teacher:
        """Have torch's compiler join what the net and its preprocessing do, from the next batch on, for good.

        That batch takes seconds longer, and so does the first one of another size, precision or grad mode. For a
        teacher whose `taps` do not change any more. A net that is one opaque graph is left as it is. Where the compiler
        fails, `forward` says so.
        """
        if self._has_modules and self._compiled is None:
            # Hooks that stay, for the compiler traces through them; those of a single pass would make it start anew.
            seen, _ = watch(self.net, features=self._features, taps=self.taps)

            def look(images: Tensor) -> tuple[Any, Activations]:
                seen.clear()
                return self.net(self.preprocessing(images)), dict(seen)

            # Isolated, or all teachers together could be compiled for eight sizes and modes, and no more.
            self._compiled = torch.compile(look, isolate_recompiles=True)  # type: ignore[call-overload]
        return self

    def _look(self, images: Tensor) -> tuple[Any, Activations]:
        if self._compiled is not None:
            try:
                return self._compiled(images)
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = str(getattr(error, "inner_exception", error)).strip().split("\n", 1)[0]
                raise self._error(f"it can't be compiled here ({reason}); set compile_teachers: false") from error
        with captured(self.net, features=self._features, taps=self.taps) as seen:
            return self.net(self.preprocessing(images)), seen

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherOutput:
        """Look at a batch.

        Parameters
        ----------
        images : (B, C, H, W) tensor
            uint8, or float in 0..255.

        Raises
        ------
        TeacherError
            When the net's output is not what the zoo says of it, or it is to be compiled and can't be.
        """
        output, seen = self._look(images)
        logits, second = self._split(output)
        if logits.ndim != 2 or logits.shape[1] != len(self.classes):
            raise self._error(
                f"its logits are {tuple(logits.shape)} for {len(self.classes)} `classes`; correct `classes`"
            )
        if self._features is None:
            second = logits if second is None else second
        elif ("features", "") in seen:
            second = seen["features", ""]
        else:
            raise self._error(f"`features`: module {self._features!r} takes no part in the forward pass")
        try:
            features = pooled(second).float()
        except ValueError as error:
            raise self._error(f"`features`: {error}; name another module") from None
        self._feature_dim = features.shape[1]
        return TeacherOutput(logits.float(), features, {tap: self._tap(seen, tap) for tap in self.taps})

    def _split(self, output: Any) -> tuple[Tensor, Any]:
        if isinstance(output, Tensor):
            return output, None
        if isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[0], Tensor):
            return output[0], output[1]
        raise self._error(f"its net returns {type(output).__name__}; it must return logits, or logits and features")

    def _tap(self, seen: dict[Any, Any], tap: str) -> Tensor:
        if ("tap", tap) not in seen:
            raise self._error(f"`taps.{tap}`: module {self.taps[tap]!r} takes no part in the forward pass")
        value = seen["tap", tap]
        if not isinstance(value, Tensor):
            raise self._error(f"`taps.{tap}`: module {self.taps[tap]!r} returns no tensor but {type(value).__name__}")
        return value.float()


def _float_type(net: nn.Module) -> torch.dtype:
    """Return what a net computes in, going by its first parameter."""
    return next((value.dtype for value in net.parameters() if value.is_floating_point()), torch.float32)


def predict(
    teacher: Teacher,
    batches: Iterable[Tensor | tuple[Any, Tensor]],
    *,
    autocast: torch.dtype | None = None,
    taps: bool = False,
) -> TeacherOutput:
    """Run a teacher over batches and put what it says together, on the CPU.

    Parameters
    ----------
    teacher : Teacher
        On the device that is to do the work.
    batches : iterable of (B, C, H, W) tensor, or of (rows, tensor)
        As ``ImageSplit.batches`` yields them.
    autocast : torch.dtype, optional
        ``torch.bfloat16`` or ``torch.float16``: run the net in mixed precision.
    taps : bool
        Whether to collect taps too; they can be large.

    Returns
    -------
    TeacherOutput
        Of all N images in order; ordinary tensors, which may take part in a graph.

    Raises
    ------
    ValueError
        When there is no batch.
    TeacherError
        When a logit or feature is NaN or infinite, or the output is not what the zoo says.
    """
    device = teacher.device
    logits, features, shown = Rows(), Rows(), {tap: Rows() for tap in teacher.taps if taps}
    with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for batch in batches:
            images = batch if isinstance(batch, Tensor) else batch[1]
            said = teacher(images.to(device, non_blocking=True))
            # Sums are NaN or infinite as soon as one value is; one number to wait for instead of a mask.
            if not torch.isfinite(said.logits.double().sum() + said.features.double().sum()):
                which = "logits" if not torch.isfinite(said.logits).all() else "features"
                raise TeacherError(
                    f"teacher {teacher.name!r}: NaN or infinite {which}; check its weights and `preprocessing`"
                    + ("" if autocast is None else f", or run it without {autocast}")
                )
            logits.add(said.logits)
            features.add(said.features)
            for tap, rows in shown.items():
                rows.add(said.taps[tap])
    # Outside of inference mode, so that the results are ordinary tensors.
    return TeacherOutput(logits.all(), features.all(), {tap: rows.all() for tap, rows in shown.items()})
