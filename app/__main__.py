"""`python -m app`: serves the page on this machine and opens it in the browser."""

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
    options = parse(arguments)
    from app.security import is_loopback

    try:
        accounts = read_accounts(options)
    except ValueError as error:
        return refuse(str(error))
    if not is_loopback(options.host) and not accounts:
        return refuse(
            f"Serving on {options.host} lets other machines in. Add --auth user:password or --auth-file FILE, "
            "or leave --host out to serve this machine only."
        )
    listening = listen(options.host, options.port)
    if listening is None:
        return refuse(
            f"No port from {options.port} to {options.port + PORTS_TO_TRY - 1} is free on {options.host}. Choose another with --port."
        )
    serve(listening, options, accounts)
    return 0


def read_accounts(options: argparse.Namespace) -> dict[str, str] | None:
    """Passwords by name; None without any. Raises ValueError with a sentence."""
    if options.auth_file is None:
        if options.auth is None:
            return None
        lines, where = (
            [options.auth],
            "--auth takes user:password, for example --auth anna:a-long-password.",
        )
    else:
        try:
            lines = options.auth_file.read_text(encoding="utf-8").splitlines()
            is_open = os.name != "nt" and options.auth_file.stat().st_mode & 0o077
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{options.auth_file} cannot be read ({error}).") from None
        if is_open:
            raise ValueError(
                f"{options.auth_file} can be read by others. Let nobody else see it: chmod 600 {options.auth_file}"
            )
        where = f"{options.auth_file} takes a line user:password for each person."
    accounts = dict(
        line.partition(":")[::2] for line in lines if line.strip() and not line.startswith("#")
    )
    if not accounts or not all(accounts.values()) or "" in accounts:
        raise ValueError(where)
    folders = {name.casefold() for name in accounts if run_folder.slug(name) == name}
    if options.auth_file and len(folders) < len(accounts):
        raise ValueError(
            f"The names in {options.auth_file} become folders: use letters, digits, - and _, each name once."
        )
    return accounts


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m app", description="Serves the page of LoRA Atelier."
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve on; any but this machine's own needs --auth (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=7860,
        help="port; the next free one is taken where it is busy (default: %(default)s)",
    )
    parser.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        default=os.environ.get("ATELIER_AUTH"),
        help="asks for this name and password; also read from $ATELIER_AUTH",
    )
    parser.add_argument(
        "--auth-file",
        type=Path,
        metavar="FILE",
        help="asks for a name and password of this file, one user:password a line; each person sees their own datasets and runs",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        default="",
        help="train on a Ray cluster instead of this machine: the address of its dashboard, such as http://head:8265 (docs/scale.md)",
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    return parser.parse_args(arguments)


def refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


def listen(host: str, port: int) -> socket.socket | None:
    """A bound socket on the first free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port, port + PORTS_TO_TRY):
        listening = socket.socket(family, socket.SOCK_STREAM)
        if os.name != "nt":  # on Windows this option would share a busy port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, candidate))
            listening.listen(128)  # only now is the port surely ours
            return listening
        except (OSError, OverflowError):
            listening.close()
    return None


def serve(
    listening: socket.socket, options: argparse.Namespace, accounts: dict[str, str] | None
) -> None:
    import uvicorn

    from app.server import create_app

    port = listening.getsockname()[1]
    shown = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    app = create_app(accounts, separate=options.auth_file is not None, ray=options.ray)
    if port != options.port:
        print(f"Port {options.port} is busy; serving on {port} instead.")
    print(
        f"LoRA Atelier is at {address}  (Ctrl-C ends the page; a running training goes on)",
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
