"""One adaptor seen as a model of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from amradio.errors import CapabilityError, UnknownAdaptorError, nearest_names
from amradio.models.configs import Resolution
from amradio.models.output import RadioOutput

if TYPE_CHECKING:
    from amradio.models.adaptors import Adaptor
    from amradio.models.radio import RadioModel


class RadioView(nn.Module):
    """A `RadioModel` that returns only one adaptor's output, or only the backbone's.

    Args:
        model: The whole model; weights are shared.
        name: A loaded adaptor's name, or ``backbone``.

    Raises:
        UnknownAdaptorError: No such adaptor is loaded.
    """

    def __init__(self, model: RadioModel, name: str) -> None:
        super().__init__()
        known = ["backbone", *model.adaptors]
        if name not in known:
            raise UnknownAdaptorError(
                f"No adaptor {name!r} is loaded, only {known}. Load the model with adaptors=[{name!r}] if the "
                f"checkpoint has it. {nearest_names(name, known)}"
            )
        self.radio = model
        self.name = name
        self.training = model.training

    def forward(self, images: Tensor, feature_fmt: str = "NLC") -> RadioOutput:
        """Compute this view's summary and features; see `RadioModel.forward`."""
        output = self.radio(images, feature_fmt)
        return output if isinstance(output, RadioOutput) else output[self.name]

    @property
    def patch_size(self) -> int:
        """Pixels between two feature positions."""
        return self.radio.patch_size // (self._adaptor.upsample_factor if self._adaptor else 1)

    @property
    def embed_dim(self) -> int:
        """Width D of the features."""
        return self._adaptor.embed_dim if self._adaptor else self.radio.embed_dim

    @property
    def summary_dim(self) -> int:
        """Width C of the summary."""
        return self._adaptor.summary_dim if self._adaptor else self.radio.summary_dim

    @property
    def min_resolution_step(self) -> int:
        """What both image sides must be multiples of, in pixels."""
        return self.radio.min_resolution_step

    @property
    def preferred_resolution(self) -> Resolution | None:
        """(height, width) that suits summaries best, if known."""
        return self.radio.preferred_resolution

    @property
    def max_resolution(self) -> int | None:
        """Largest side in pixels that the publishers recommend."""
        return self.radio.max_resolution

    @property
    def identity(self) -> Any:
        """Where the weights came from."""
        return self.radio.identity

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        """Round a size in pixels to the nearest one that the model accepts."""
        return self.radio.get_nearest_supported_resolution(height, width)

    @property
    def text(self) -> Any:
        """The adaptor's text side, loaded at the first use; see `Adaptor.text`."""
        return self._text_adaptor.text

    @property
    def tokenizer(self) -> Any:
        """The adaptor's tokenizer; see `Adaptor.tokenizer`."""
        return self._text_adaptor.tokenizer

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        """Embed tokenized text in this view's summary space; see `Adaptor.encode_text`."""
        return self._text_adaptor.encode_text(tokens, normalize)

    @property
    def _adaptor(self) -> Adaptor | None:
        return None if self.name == "backbone" else self.radio.adaptors[self.name]  # type: ignore[return-value]

    @property
    def _text_adaptor(self) -> Adaptor:
        if self._adaptor is None:
            raise CapabilityError("The backbone has no text side; take the view of an adaptor that has one.")
        return self._adaptor
