"""The demo: a page to talk with LLaVAs about pictures. The folder is a Hugging Face Space as it stands."""
