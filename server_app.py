"""The Flower ServerApp. It wires; `fl_taskarith.server.launch` works."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_taskarith.client.app import app as client_app
from fl_taskarith.config.settings import from_run_config
from fl_taskarith.server.launch import run_federation, show_log

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run-config describes; the results folder is printed at the end."""
    show_log()
    run_federation(from_run_config(context.run_config), client_app, grid)
