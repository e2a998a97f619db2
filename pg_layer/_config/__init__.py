"""The options of a layer and the databases that they name."""
