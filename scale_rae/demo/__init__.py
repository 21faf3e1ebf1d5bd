"""The demo page, `scale-rae demo` (gradio, extra `demo`): page.py has its tabs, shared_model.py the work behind them."""
