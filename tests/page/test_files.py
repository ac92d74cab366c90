"""What can be had from the server without being shown it."""

from __future__ import annotations

import urllib.error
import urllib.request
import uuid

import pytest

# A server and a browser take longer to start than most tests take.
pytestmark = pytest.mark.slow

PHOTO = b"the photograph of another visitor"


def answer(request: str | urllib.request.Request) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(request, timeout=60) as found:
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(address: str, content: bytes) -> tuple[int, bytes]:
    border = uuid.uuid4().hex
    head = (
        f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="photo.jpg"\r\n\r\n'
    )
    body = head.encode() + content + f"\r\n--{border}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={border}"}
    return answer(urllib.request.Request(f"{address}gradio_api/upload", body, headers))


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "//etc/passwd",
        "app.py",
        "bokehdiff/__init__.py",
        "http://127.0.0.1/",
        "/tmp",
        "visitors/../../../../../../etc/passwd",
    ],
)
def test_no_file_of_the_server_is_handed_out(address: str, path: str) -> None:
    for prefix in ("gradio_api/file=", "gradio_api/file%3D", "file="):
        status, content = answer(f"{address}{prefix}{path}")
        assert status in (400, 403, 404), (prefix, status)
        assert b"root:" not in content


def test_a_photograph_of_another_visitor_is_refused(address: str) -> None:
    status, paths = upload(address, PHOTO)
    assert status == 200
    path = paths.decode().strip('[]"')
    status, content = answer(f"{address}gradio_api/file={path}")
    assert status == 403 and PHOTO not in content
    folder = path[: path.index("/", path.index("bokehdiff-page-"))]
    around = f"{folder}/visitors/..{path.removeprefix(folder)}"
    status, content = answer(f"{address}gradio_api/file={around}")
    assert status == 403 and PHOTO not in content


def test_a_file_that_is_too_large_is_refused(address: str) -> None:
    status, content = upload(address, bytes(65 * 2**20))
    assert status == 413 and b"maximum allowed size" in content
