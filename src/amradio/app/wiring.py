"""From events of the page to functions that know no Gradio, and from errors to sentences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from amradio.app.visit import House, Visit
from amradio.errors import AmradioError, MissingDependencyError

MODEL = "model"
"""Everything runs one after the other: the model uses all cores anyway."""

_log = logging.getLogger("amradio.app")
_SECONDS_SHOWN = 12
_LONGEST_MESSAGE = 600


def import_gradio() -> Any:
    """Import Gradio.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import gradio
    except ImportError as e:
        raise MissingDependencyError(
            "The app needs gradio, which is not installed. Install it with `pip install 'amradio[app]'`."
        ) from e
    return gradio


class Wiring:
    """Connects events of a page with functions.

    Args:
        house: What all pages share.
    """

    def __init__(self, house: House) -> None:
        self._house = house
        self._gradio = import_gradio()

    def on(
        self,
        listen: Callable[..., Any],
        function: Callable[..., Any],
        inputs: Sequence[Any] = (),
        outputs: Sequence[Any] = (),
        **options: Any,
    ) -> Any:
        """Call a function when something happens.

        Args:
            listen: A listener of Gradio, such as ``button.click``.
            function: Takes a `Visit` and the values of the inputs; returns the value of the output, or several.
            inputs: Components.
            outputs: Components.
            **options: For Gradio.

        Returns:
            What the listener returns; has ``then`` and ``success``.
        """
        return listen(
            self.adapted(function),
            inputs=list(inputs),
            outputs=list(outputs),
            api_visibility="private",
            concurrency_id=MODEL,
            **options,
        )

    def adapted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function as Gradio calls it."""
        gr = self._gradio

        def call(request: Any, event: Any, progress: Any = gr.Progress(), *values: Any) -> Any:  # noqa: B008
            try:
                return function(self._visit(request, event, progress), *values)
            except AmradioError as error:
                raise gr.Error(plain(error), duration=_SECONDS_SHOWN, print_exception=False) from None
            except Exception as error:
                _log.exception("A request of the page failed")
                raise gr.Error(
                    "Something went wrong in the app. The terminal in which it runs says more.",
                    duration=_SECONDS_SHOWN,
                    print_exception=False,
                ) from error

        # Gradio finds out by these what each argument is for.
        call.__annotations__ = {"request": gr.Request, "event": gr.EventData}
        call.__name__ = function.__name__
        return call

    def on_unload(self) -> Callable[..., Any]:
        """What is called when a page is closed: its session is forgotten."""

        def forget(request: Any) -> None:
            self._house.sessions.drop(str(request.session_hash))

        forget.__annotations__ = {"request": self._gradio.Request}
        return forget

    def _visit(self, request: Any, event: Any, progress: Any) -> Visit:
        data = getattr(event, "_data", None)
        return Visit(
            house=self._house,
            session=self._house.sessions.get(str(request.session_hash)),
            event=data if isinstance(data, dict) else {},
            on_progress=lambda share, what: progress(share, desc=what),
            on_notice=lambda text: self._gradio.Warning(text, duration=_SECONDS_SHOWN),
        )


def plain(error: Exception) -> str:
    """An error in a length that fits the page, without what HTML would make of it."""
    from amradio.app.markup import escaped

    text = str(error)
    return escaped(text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "…")
