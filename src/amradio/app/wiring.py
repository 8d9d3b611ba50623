"""From events of the page to functions that know no Gradio, and from errors to sentences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from amradio.app.visit import KEEP, House, Visit
from amradio.errors import AmradioError, MissingDependencyError

MODEL, PHOTOS, PAGE = "model", "photos", "page"
"""Three queues, each of which does one thing after the other: the model, which uses all cores anyway; the reading of
photos; and everything that takes no time, and must not wait for the others."""

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

    With each event the page sends the stamp of its session (see `amradio.app.sessions.Session.stamp`), and gets the one
    of now. So it learns that there is something to draw, and also that its session is gone.

    Args:
        house: What all pages share.
        stamp: The component that keeps the stamp.
    """

    def __init__(self, house: House, stamp: Any) -> None:
        self._house = house
        self._stamp = stamp
        self._gradio = import_gradio()

    def on(
        self,
        listen: Callable[..., Any],
        function: Callable[..., Any],
        inputs: Sequence[Any] = (),
        outputs: Sequence[Any] = (),
        *,
        queue: str = PAGE,
        begins: bool = False,
        **options: Any,
    ) -> Any:
        """Call a function when something happens.

        Args:
            listen: A listener of Gradio, such as ``button.click``.
            function: Takes a `Visit` and the values of the inputs; returns the value of the output, or several.
            inputs: Components.
            outputs: Components.
            queue: Where it waits for its turn.
            begins: Whether it makes sense on a page whose session is gone. Other functions are not called there.
            **options: For Gradio. Unless they say otherwise, no event is lost and each has its turn. Gradio's
                ``always_last`` does not fit events with data: it repeats the data of the first one.

        Returns:
            What the listener returns; has ``then`` and ``success``.
        """
        return listen(
            self.adapted(function, len(outputs), begins=begins),
            inputs=[self._stamp, *inputs],
            outputs=[*outputs, self._stamp],
            api_visibility="private",
            concurrency_id=queue,
            **{"trigger_mode": "multiple", "show_progress": "hidden", **options},
        )

    def adapted(self, function: Callable[..., Any], outputs: int, *, begins: bool = False) -> Callable[..., Any]:
        """A function as Gradio calls it."""
        gr = self._gradio

        def call(request: Any, event: Any, progress: Any = gr.Progress(), stamp: Any = "", *values: Any) -> Any:  # noqa: B008
            try:
                visit = self._visit(request, event, progress, stamp if isinstance(stamp, str) else "")
                is_lost = not visit.session.is_of(stamp if isinstance(stamp, str) else "")
                answer = KEEP if is_lost and not begins else function(visit, *values)
            except AmradioError as error:
                raise gr.Error(plain(str(error)), duration=_SECONDS_SHOWN, print_exception=False) from None
            except Exception as error:
                _log.exception("A request of the page failed")
                raise gr.Error(
                    "Something went wrong in the app. The terminal in which it runs says more.",
                    duration=_SECONDS_SHOWN,
                    print_exception=False,
                ) from error
            if answer is KEEP:
                answers: Sequence[Any] = [KEEP] * outputs
            else:
                answers = [answer] if outputs == 1 else answer or ()
            stamp = visit.session.stamp
            return (*(gr.skip() if a is KEEP else a for a in answers), stamp) if outputs else stamp

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

    def _visit(self, request: Any, event: Any, progress: Any, stamp: str) -> Visit:
        data = getattr(event, "_data", None)
        return Visit(
            house=self._house,
            session=self._house.sessions.get(str(request.session_hash), stamp),
            event=data if isinstance(data, dict) else {},
            on_progress=lambda share, what: progress(share, desc=what),
            on_notice=lambda text: self._gradio.Warning(plain(text), duration=_SECONDS_SHOWN),
        )


def plain(text: str) -> str:
    """A message in a length that fits the page, without what HTML would make of it."""
    from amradio.app.markup import escaped

    return escaped(text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "…")
