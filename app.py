"""The page of bokehdiff as a Hugging Face Space; on a computer of your own: ``bokehdiff app``."""

from bokehdiff.page.server import serve
from bokehdiff.page.settings import PageSettings

if __name__ == "__main__":
    serve(PageSettings())
