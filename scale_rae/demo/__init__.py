"""A page to draw with: `scale-rae demo`. work.py does what it asks for, page.py is the page (gradio, extra `demo`)."""
