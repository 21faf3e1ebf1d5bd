"""The endpoints, one file each: images, chat, responses, models, health, home. `body`, `checks` and `conversations` are shared."""
