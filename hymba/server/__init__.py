"""OpenAI's API over the engine: `create_app(llm, settings)` is the whole server.

    app.py       the routes
    protocol.py  what clients may ask          prompts.py   what that means for the engine
    shapes.py    what they are answered        answers.py   deltas made into answers and streams
    errors.py    mistakes in OpenAI's form     guard.py     key, sizes, drain: before any route
    metrics.py   counters for Prometheus       run.py       uvicorn, and what a signal does
    page/        the chat page, static
    replicas.py  several models on Ray Serve, kept alive (the only file that imports ray)
    front.py     the one address before them          affinity.py  which of them gets a call

The only room that imports a web framework.
"""

from hymba.server.app import create_app
from hymba.server.settings import Settings

__all__ = ["Settings", "create_app"]
