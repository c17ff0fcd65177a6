"""A model as an HTTP service with a page: limits, batching, pictures, the routes, and the process around them.

app = make_app(residuum.load("model.safetensors"), Limits())
serve(app, "127.0.0.1", 8000)
"""
