"""An NBD server for anything that implements `nbdserver.export.Export`."""
