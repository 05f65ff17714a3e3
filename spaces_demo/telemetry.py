"""Telemetry off: imported before Gradio and huggingface_hub, which read the variables when they are imported."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
