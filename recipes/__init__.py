"""Training recipes. They import the package's model classes; nothing in the package imports them."""
