"""``layer.sync``: the layer on a connection of Django's."""
