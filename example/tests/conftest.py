pytest_plugins = ["pg_layer.testing"]
