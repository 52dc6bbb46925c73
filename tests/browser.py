"""Headless Chromium, which the system brings, over its debugging pipe: no driver and no port."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
         "--no-first-run", "--hide-scrollbars", "--proxy-server=127.0.0.1:1")  # fmt: skip # nothing outside is reached


def executable() -> str:
    for name in NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    raise RuntimeError(f"needs one of {', '.join(NAMES)} on the PATH. Remedy: apt-get install chromium")


class Page:
    """One tab. The protocol's messages are JSON, each ended by a zero byte."""

    def __init__(self, to: int, answers: int) -> None:
        self.to, self.answers, self.last, self.left, self.session = to, answers, 0, b"", None
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def message(self) -> dict:
        while b"\0" not in self.left:
            read = os.read(self.answers, 1 << 16)
            if not read:
                raise RuntimeError("Chromium has ended")
            self.left += read
        first, _, self.left = self.left.partition(b"\0")
        return json.loads(first)

    def call(self, method: str, **parameters) -> dict:
        self.last += 1
        call = {"id": self.last, "method": method, "params": parameters}
        content = json.dumps(call if self.session is None else {**call, "sessionId": self.session}).encode() + b"\0"
        while content:
            content = content[os.write(self.to, content) :]
        while (message := self.message()).get("id") != self.last:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path | str) -> None:
        """A file, or an address of this machine."""
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def run(self, expression: str):
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({selector!r}).innerText")

    def text_content(self, selector: str) -> str:
        """Also of what is not seen."""
        return self.run(f"document.querySelector({selector!r}).textContent")

    def point(self, selector: str, touch: bool = False) -> None:
        x, y = self.run(f"""(() => {{
            const element = document.querySelector({selector!r});
            element.scrollIntoView({{block: "center"}});
            const r = element.getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2];
        }})()""")
        if touch:
            self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def requests(self) -> list[str]:
        """What was asked for since the page was opened, the page itself and what is inside it left out."""
        sent = [event["params"]["request"]["url"] for event in self.events
                if event.get("method") == "Network.requestWillBeSent"]  # fmt: skip
        return [url for url in sent if not url.startswith(("file:", "data:"))]

    def screenshot(self, path: Path) -> None:
        content = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(content))


@contextlib.contextmanager
def page(profile: Path):
    """``profile``: an empty folder. Chromium reads from file descriptor 3 and writes to 4."""
    commands, to = os.pipe()
    answers, written = os.pipe()
    script = f'exec "$@" 3<&{commands} 4>&{written}'
    arguments = (executable(), *FLAGS, f"--user-data-dir={profile}")
    process = subprocess.Popen(["bash", "-c", script, "bash", *arguments], pass_fds=(commands, written),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    os.close(commands)
    os.close(written)
    try:
        yield Page(to, answers)
    finally:
        os.close(to)  # then it ends
        os.close(answers)
        process.terminate()
        process.wait(30)
