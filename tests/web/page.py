"""A browser's tab that shows the host's front end."""

from __future__ import annotations

from typing import Any

from harness.server import Server

PATIENCE = 90  # seconds, for machines whose few cores are busy
READY = """
    const app = window.comfyAPI?.app?.app, shown = app?.extensionManager;
    return Boolean(shown?.workflow?.activeWorkflow && !shown.spinner && app.graph.nodes.length);
"""  # the host opens its default workflow by itself, and an earlier call of ours would collide with that
EMPTY = {"version": 0.4, "nodes": [], "links": []}
QUEUE = """
    const {api} = window.comfyAPI.api;
    const ended = new Promise((resolve) => {
        for (const end of ["execution_success", "execution_error"])
            api.addEventListener(end, () => resolve(end), {once: true});
    });
    await app.queuePrompt(0, 1);
    return await ended;
"""


class Page:
    """The front end in one of its renderers (nodes2 or classic)."""

    def __init__(self, driver: Any, server: Server, *, nodes2: bool):
        self.driver = driver
        self.server = server
        self._logged: list[str] = []
        settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": nodes2, "Comfy.Workflow.Persist": False}
        server.request("/settings", settings)
        driver.get(server.url)
        self.wait(READY)

    def clear(self) -> None:
        """Opens an empty workflow."""
        self.run("await app.loadGraphData(given[0], true);", EMPTY)

    def run(self, script: str, *given: Any) -> Any:
        """What an async function with this body returns; it sees the host's `app`, `LiteGraph`, and `given`."""
        body = "const [given, done] = arguments, app = window.comfyAPI.app.app; (async () => {" + script
        body += "})().then((found) => done({found}), (error) => done({error: String(error.stack)}));"
        answer = self.driver.execute_async_script(body, given)
        assert "error" not in answer, answer["error"]
        return answer.get("found")

    def wait(self, script: str, *given: Any) -> Any:
        """What a function with this body returns, once that is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        body = f"const [given] = arguments; {script}"
        return WebDriverWait(self.driver, PATIENCE, 0.1).until(
            lambda driver: driver.execute_script(body, given), f"never true: {script}"
        )

    def queue(self) -> str:
        """Runs the workflow; returns the event that ended it."""
        return self.run(QUEUE)

    def console(self) -> list[str]:
        """The errors and warnings that the console has shown."""
        self._logged += [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
        return self._logged
