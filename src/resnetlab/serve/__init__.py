"""An HTTP service for one model, with a web page: limits, batching, uploads, routes and the server process.

app = make_app(Service(served_model, Limits()))
run_server(app, "127.0.0.1", 8000, timeout=30, on_ready=print)
"""
