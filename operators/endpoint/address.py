"""Where a server is: the address as it is given, and as requests use it."""

from typing import Final
from urllib.parse import urlsplit

from schemas.errors import ConfigError

ROOT_PATH: Final = "/v1"
"""Of a server that is named by host and port alone: where all of them serve the protocol."""

CHAT_PATH: Final = "/chat/completions"


def endpoint_url(address: str) -> str:
    """Return the root of a server's addresses, without a slash at its end.

    Args:
        address: `http://host:8000/v1`, also without the path, or with that of a request.

    Raises:
        ConfigError: it is no HTTP address, or carries a secret or a query; the message does not repeat those.
    """
    try:
        parts = urlsplit(address.strip())
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"the endpoint is no address: {error}") from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "the endpoint's address carries a user, a query or a fragment: give scheme, host, port and path, and put a "
            "key into the environment as PAGEREEL_ENDPOINT_KEY"
        )
    if parts.scheme not in ("http", "https") or not host or any(char.isspace() for char in address.strip()):
        raise ConfigError(f"the endpoint {address!r} is no address such as http://host:8000/v1")
    path = parts.path.rstrip("/").removesuffix(CHAT_PATH).rstrip("/") or ROOT_PATH
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{f':{port}' if port is not None else ''}{path}"
