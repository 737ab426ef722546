"""The web page. It reads run folders, writes settings and starts processes.

It imports no torch and only the modules of `trainer` that work without it. Start with `layout.py`
for the tabs, and with `server.py` for the routes.
"""
