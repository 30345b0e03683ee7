"""The Flower ClientApp: one virtual client per partition. It wires; `fl_taskarith.client` works."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_taskarith import client

app = ClientApp()


@app.query("partition")
def partition(message: Message, context: Context) -> Message:
    """Which partition this client holds."""
    return client.answer(client.tell_partition, message, context)


@app.query("ridge")
def ridge(message: Message, context: Context) -> Message:
    """The client's sums for the federated ridge head."""
    return client.answer(client.ridge_statistics, message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """J local steps; the reply carries the task vector."""
    return client.answer(client.train, message, context)
