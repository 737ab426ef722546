"""`python -m app`: serves the page on this machine and opens it in the browser."""

import argparse
import os
import socket
import sys
import threading
import webbrowser

PORTS_TO_TRY = 20


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from app.guard import is_loopback

    if options.auth is not None and (":" not in options.auth or not all(options.auth.split(":", 1))):
        return refuse("--auth takes user:password, for example --auth anna:a-long-password.")
    if not is_loopback(options.host) and not options.auth:
        return refuse(
            f"Serving on {options.host} lets other machines in. Add --auth user:password, or leave --host out to serve this machine only."
        )
    listening = listen(options.host, options.port)
    if listening is None:
        return refuse(
            f"No port from {options.port} to {options.port + PORTS_TO_TRY - 1} is free on {options.host}. Choose another with --port."
        )
    serve(listening, options)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app", description="Serves the page of LoRA Atelier.")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve on; any but this machine's own needs --auth (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port; the next free one is taken where it is busy (default: %(default)s)")
    parser.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        default=os.environ.get("ATELIER_AUTH"),
        help="asks for this name and password; also read from $ATELIER_AUTH",
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


def serve(listening: socket.socket, options: argparse.Namespace) -> None:
    import uvicorn

    from app.server import create_app

    port = listening.getsockname()[1]
    shown = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    app = create_app(options.auth)
    if port != options.port:
        print(f"Port {options.port} is busy; serving on {port} instead.")
    print(f"LoRA Atelier is at {address}  (Ctrl-C ends the page; a running training goes on)", flush=True)
    if not options.no_browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False))
    server.run(sockets=[listening])


if __name__ == "__main__":
    sys.exit(main())
