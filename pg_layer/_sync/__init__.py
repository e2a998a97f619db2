"""``layer.sync``: the layer on Django's connections."""
