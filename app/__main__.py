"""Serves the page on this machine and opens it in the browser: `python -m app`."""

import argparse
import os
import socket
import sys
import threading
import webbrowser
from pathlib import Path

from trainer.runs import run_folder

PORTS_TO_TRY = 20


def main(arguments: list[str] | None = None) -> int:
    """Serves the page until Ctrl-C. Returns the exit code."""
    options = parse(arguments)
    from app.security import is_loopback

    try:
        accounts = read_accounts(options)
    except ValueError as error:
        return refuse(str(error))
    if not is_loopback(options.host) and not accounts:
        return refuse(
            f"Serving on {options.host} lets other machines in. Add --auth user:password or "
            "--auth-file FILE, or omit --host to serve this machine only."
        )
    listening = listen(options.host, options.port)
    if listening is None:
        return refuse(
            f"No port from {options.port} to {options.port + PORTS_TO_TRY - 1} is free on "
            f"{options.host}. Choose another one with --port."
        )
    serve(listening, options, accounts)
    return 0


def read_accounts(options: argparse.Namespace) -> dict[str, str] | None:
    """Returns passwords by name, or None without accounts. Raises ValueError with a message."""
    if options.auth_file is None:
        if options.auth is None:
            return None
        lines = [options.auth]
        expected = "--auth takes user:password, for example --auth anna:a-long-password."
    else:
        try:
            lines = options.auth_file.read_text(encoding="utf-8").splitlines()
            is_open = os.name != "nt" and options.auth_file.stat().st_mode & 0o077
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{options.auth_file} cannot be read ({error}).") from None
        if is_open:
            raise ValueError(
                f"Other users can read {options.auth_file}. Run: chmod 600 {options.auth_file}"
            )
        expected = f"{options.auth_file} needs a line user:password for each person."
    accounts = dict(
        line.partition(":")[::2] for line in lines if line.strip() and not line.startswith("#")
    )
    if not accounts or not all(accounts.values()) or "" in accounts:
        raise ValueError(expected)
    folders = {name.casefold() for name in accounts if run_folder.slug(name) == name}
    if options.auth_file and len(folders) < len(accounts):
        raise ValueError(
            f"The names in {options.auth_file} become folders. Use letters, digits, - and _, "
            "and each name once."
        )
    return accounts


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m app", description="Serves the page of LoRA Atelier."
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve; other machines need --auth (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=7860,
        help="port, or the next free one if it is busy (default: %(default)s)",
    )
    parser.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        default=os.environ.get("ATELIER_AUTH"),
        help="require this name and password; also read from $ATELIER_AUTH",
    )
    parser.add_argument(
        "--auth-file",
        type=Path,
        metavar="FILE",
        help="require a name and password from this file, one user:password per line; "
        "each person sees separate datasets and runs",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        default="",
        help="train on a Ray cluster instead of this machine; the address of its dashboard, "
        "such as http://head:8265 (docs/scale.md)",
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    return parser.parse_args(arguments)


def refuse(message: str) -> int:
    """Prints why the page cannot start. Returns the exit code."""
    print(message, file=sys.stderr)
    return 1


def listen(host: str, port: int) -> socket.socket | None:
    """Returns a listening socket on the first free port, or None."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port, port + PORTS_TO_TRY):
        listening = socket.socket(family, socket.SOCK_STREAM)
        if os.name != "nt":
            # On Windows this option would share a busy port.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, candidate))
            # Another process may bind the same port until this one listens.
            listening.listen(128)
            return listening
        except (OSError, OverflowError):
            listening.close()
    return None


def serve(
    listening: socket.socket, options: argparse.Namespace, passwords: dict[str, str] | None
) -> None:
    """Serves the page on a socket until the process is interrupted."""
    # Imported late, so that a wrong option is reported at once.
    import uvicorn

    from app.server import create_app

    port = listening.getsockname()[1]
    shown = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    host = f"[{shown}]" if ":" in shown else shown
    address = f"http://{host}:{port}"
    app = create_app(passwords, separate=options.auth_file is not None, ray=options.ray)
    if port != options.port:
        print(f"Port {options.port} is busy; serving on {port} instead.")
    print(
        f"LoRA Atelier is at {address}  (Ctrl-C ends the page; a running training continues)",
        flush=True,
    )
    if not options.no_browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False)
    )
    server.run(sockets=[listening])


if __name__ == "__main__":
    sys.exit(main())
