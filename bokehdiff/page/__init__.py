"""The page to click on: ``bokehdiff app``. Needs gradio, ``pip install 'bokehdiff[app]'``."""
