"""The endpoints, one file each: images, chat, models, health. `checks` has what requests to several of them have to pass."""
