"""Local steps of one client: SGDM from the global model, from one of K models, or under the client's own mask."""

from flwr.app import Message, RecordDict

from fl_taskarith.client.local_work import Work
from fl_taskarith.engine.records import metric, to_record, to_tensors
from fl_taskarith.masking.mask import Mask
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.storage.client_files import MASK, OWN, under
from fl_taskarith.training.corrections import correct_gradients
from fl_taskarith.training.local import set_trained, train_locally
from fl_taskarith.training.sparse_sgdm import sgdm
from fl_taskarith.workspace.global_model import GlobalModel, Weights
from fl_taskarith.workspace.make_mask import make_mask, shard_sums


def train(message: Message, partition: int) -> RecordDict:
    """Take J local steps from the global model; reply with the task vector τ = θ_k − θ of what was sent."""
    work = Work(message.content, partition)
    return _train(work, work.received["arrays"])


def train_in_cluster(message: Message, partition: int) -> RecordDict:
    """Take J local steps from the one of K models, stacked in the message, with the least loss on this client's shard.

    The reply has the cluster, and the task vector of its model, [1, ...] per tensor.
    """
    work = Work(message.content, partition)
    data = work.training_data()
    own, losses = data.examples.take(data.shard), []
    models = [{name: value[cluster] for name, value in work.received["arrays"].items()}
              for cluster in range(work.config.num_clusters)]  # fmt: skip
    for model in models:
        work.home.place(GlobalModel(model, work.frozen))
        losses.append(work.home.evaluate(own).loss)
    chosen = losses.index(min(losses))
    reply = _train(work, models[chosen])
    metrics = reply.metric_records["metrics"]
    metrics["partitions"], metrics["clusters"] = [partition], [chosen]
    metrics["losses"] = [metric(metrics, "train-loss")]
    task_vector = to_tensors(reply.array_records["arrays"], work.home.device)
    reply["arrays"] = to_record({name: value[None] for name, value in task_vector.items()})
    return reply


def _train(work: Work, shared: Weights) -> RecordDict:
    """Train from the tensors `shared`, which are the global ones or those of one cluster."""
    home, config, current, frozen = work.home, work.config, work.current, work.frozen
    trained = all_trained(work, shared, work.state)
    mask, new_mask = frozen.mask, Weights()
    if config.mask_source == "own" and current.number > config.head_rounds:
        mask, new_mask = _own_mask(work)
    home.place(GlobalModel(trained, frozen))
    if mask is not frozen.mask:
        assert mask is not None
        trained = shared = mask.gather(trained)
    parameters = dict(zip(trained, set_trained(home.model, list(trained)), strict=True))
    data = work.training_data()
    optimizer = sgdm(parameters.items(), config, current.learning_rate, mask)
    shift = work.gradient_shift(shared)
    if config.proximal_mu or shift is not None:
        indices = None if mask is None else mask.indices
        correct_gradients(optimizer, parameters, indices, start=trained, proximal_mu=config.proximal_mu, shift=shift)
    loss = train_locally(
        home.compiled_network,
        data.examples,
        data.shard,
        optimizer,
        home.preprocessing,
        local_steps=work.local_steps,
        batch_size=config.batch_size,
        precision=config.precision,
        generator=data.generator,
        loss=home.local_loss(current.logit_scale),
    )
    # The task vector lies in the model's own storage: the next client loads its own weights.
    ends = {name: value.detach() for name, value in home.parameters.items()}
    ends = ends if mask is None else mask.gather(ends)
    keeps = {OWN + name: ends[name].clone() for name in trained if name not in shared}
    keeps |= {MASK + name: value for name, value in new_mask.items()}
    reply = work.trained_reply(shared, ends, keeps, loss)
    if new_mask:
        reply["mask"] = to_record(new_mask)
    return reply


def all_trained(work: Work, shared: Weights, state: Weights) -> Weights:
    """Return all that is trained, in the model's order and in the shapes of `GlobalModel.trained`.

    A tensor is the one that was sent, else the client's own of its last round, else θ₀.
    """
    home, mask = work.home, work.frozen.mask
    names = list(home.trained_names(work.current.number) if mask is None else mask.indices)
    if shared.keys() >= set(names):
        return shared
    own = (home.pretrained if mask is None else mask.gather(home.pretrained)) | under(OWN, state)
    return {name: shared[name] if name in shared else own[name] for name in names}


def _own_mask(work: Work) -> tuple[Mask, Weights]:
    """Return this client's mask, by the scores of its own shard, and its bits if it is new."""
    home = work.home
    if bits := under(MASK, work.state):
        # In the model's order, not the file's: norms over tensors are to have the same bits whenever it is read.
        packed = {name: bits[name] for name in home.shapes if name in bits}
        return Mask.unpacked(packed, home.shapes).to(home.device), {}
    head = {name: (home.pretrained | work.frozen.weights)[name] for name in HEAD_PARAMETERS}
    mask = make_mask(home, shard_sums(home, head, work.partition)).mask
    return mask, mask.packed()
