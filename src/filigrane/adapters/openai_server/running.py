"""Running the application with uvicorn until a signal ends it."""

from typing import Any

from filigrane.errors import MissingDependency

try:
    import uvicorn
except ImportError as error:
    raise MissingDependency(
        "the server needs more packages: pip install 'filigrane[server]'"
    ) from error


def server(app: Any, *, host: str, port: int, grace: int = 30) -> Any:
    """A `uvicorn.Server` for the application, to be run by the caller."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            # Addresses may hold what clients put there. Lines for requests come from the
            # application, which knows what must not be in them.
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=grace,
            lifespan="on",
        )
    )


def serve(app: Any, *, host: str, port: int, grace: int = 30) -> None:
    """Listen until SIGTERM or SIGINT; what is being written then has `grace` seconds to end."""
    server(app, host=host, port=port, grace=grace).run()
