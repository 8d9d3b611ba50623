"""How much the page may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one app. They bound memory, disk and time, whoever asks.

    Attributes:
        photos: In a session.
        file_bytes: Of an uploaded file.
        file_pixels: Of an uploaded picture, as its header says, before anything is decoded.
        upload_bytes: Of one request with files.
        disk_bytes: Of all uploads that wait to be read; more are turned away for the moment.
        request_bytes: Of a request without files.
        kept_side: Longest side in pixels at which a photo is kept; a larger one is made smaller.
        words: Labels, or words of one query.
        word_length: Characters of one label.
        strokes: In a photo.
        points: Of all strokes in a photo.
        sessions: Pages that are open at the same time; the one that was used longest ago gives way.
        idle_s: After how many seconds without use the photos of a page are forgotten.
        cache_bytes: Of all feature maps that are kept, so that they need not be computed again.
        queue: Requests that wait for the model.
        results: Pictures that a search shows.
    """

    photos: int = 24
    file_bytes: int = 25 * 2**20
    file_pixels: int = 60_000_000
    upload_bytes: int = 24 * 25 * 2**20
    disk_bytes: int = 2 * 2**30
    request_bytes: int = 2 * 2**20
    kept_side: int = 1024
    words: int = 40
    word_length: int = 80
    strokes: int = 400
    points: int = 20_000
    sessions: int = 16
    idle_s: float = 3600.0
    cache_bytes: int = 2**30
    queue: int = 32
    results: int = 24
