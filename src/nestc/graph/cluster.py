"""Decide which nodes go together in one region: an anchor with its elementwise tail, or a group without an anchor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from nestc.graph.kinds import TAILED, has_body, is_constant, is_elementwise, is_move, is_view, widens
from nestc.graph.model import static_shape

MAX_NODES = 32
"""Nodes of one region; longer chains spill registers and compile slowly without running faster."""
MAX_OUTPUTS = 4
_LOOK_AHEAD = 12  # nodes that one step may need to bring several live values back to one (Mish needs 3, tanh-Gelu 8)
_PULL_DEPTH = 4  # elementwise operands computed on the way, e.g. the gate of a gated unit

VIEW = "view"
"""The anchor of a region that only gives a value another shape."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of one region in topological order; `anchor` is its one heavy operator, `VIEW`, or None."""

    nodes: tuple[ir.Node, ...]
    anchor: str | None


def clusters(graph: ir.Graph, alone: Collection[str] = ()) -> list[Cluster]:
    """Cut a topologically sorted graph into regions, in an order in which they can run.

    Nodes named in `alone` get a region each.

    Greedy: a region starts at the first node that is left and takes in nodes whose other operands earlier regions
    have computed. A region thus never waits for something that waits for it, so no cycle can arise. A node that only
    widens narrow numbers for one user (DequantizeLinear, Cast from bfloat16) is left to the region of that user, so
    that what lies in memory between regions is narrow.
    """
    return _Former(graph, alone).run()


def cut_cluster(cluster: Cluster, cuts: Collection[str]) -> list[Cluster]:
    """A cluster as the pieces that end at the nodes named in `cuts`, in an order in which they can run.

    A piece is such a node with all that it needs of the cluster and no earlier piece has, so no piece waits for a later
    one. At most 26 pieces.
    """
    rest = list(cluster.nodes)
    pieces: list[Cluster] = []
    for node in cluster.nodes:
        if node.name not in cuts or node not in rest or cluster.anchor == VIEW or len(pieces) == 25:
            continue
        needed = _needed(node, set(rest))
        if len(needed) < len(rest):
            pieces.append(_piece(cluster, [each for each in rest if each in needed]))
            rest = [each for each in rest if each not in needed]
    return [*pieces, _piece(cluster, rest)] if pieces else [cluster]


def _needed(node: ir.Node, inside: set[ir.Node]) -> set[ir.Node]:
    """`node` and all nodes of `inside` that it depends on."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in found:
            continue
        found.add(each)
        sources = [value.producer() for value in each.inputs if value is not None]
        waiting += [source for source in sources if source is not None and source in inside]
    return found


def _piece(cluster: Cluster, nodes: Sequence[ir.Node]) -> Cluster:
    heavy = [node for node in nodes if not is_elementwise(node) and node.op_type == cluster.anchor]
    return Cluster(tuple(nodes), cluster.anchor if heavy else None)


class _Former:
    """State of one run: which nodes have found their region."""

    def __init__(self, graph: ir.Graph, alone: Collection[str]) -> None:
        self.order = _parameters_first(graph)
        self.alone = {node for node in graph if node.name in alone}
        self.position = {node: index for index, node in enumerate(self.order)}
        self.done: set[ir.Node] = set()

    def run(self) -> list[Cluster]:
        found: list[Cluster] = []
        for node in self.order:
            if node not in self.done and not self.waits(node):
                cluster = self.start(node)
                self.done.update(cluster.nodes)
                found.append(cluster)
        return found

    def start(self, head: ir.Node) -> Cluster:
        """The region whose first node is `head`."""
        if is_view(head) and _known(head) and head not in self.alone:
            return Cluster(tuple(self.view_chain(head)), VIEW)
        prologue = [] if has_body(head) else self.prologue(head)
        free = is_elementwise(head) or (is_move(head) and not prologue)
        anchor = None if free else head.op_type
        movable = free or is_move(head)
        single = has_body(head) or not _known(head) or head in self.alone or not (movable or head.op_type in TAILED)
        if single or sum(not _unused(value) for value in head.outputs) != 1:
            return Cluster((*prologue, head), anchor)
        nodes = self.tail(prologue, head)
        if all(map(is_elementwise, nodes)):  # several outputs of one shape are stored by one loop
            self.widen(nodes)
        return Cluster(tuple(nodes), anchor)

    def waits(self, node: ir.Node) -> bool:
        """Whether a node that widens narrow numbers is left to the region of its only user."""
        if not widens(node) or node in self.alone or not _known(node):
            return False
        value = node.outputs[0]
        users = {user for user, _ in value.uses()}
        user = next(iter(users)) if len(users) == 1 else None
        if user is None or value.is_graph_output() or user not in self.position or user in self.alone:
            return False
        if has_body(user) or is_view(user) or not _known(user):
            return False
        # A smaller operand of an elementwise operator is computed before: it would be widened again and again.
        return not is_elementwise(user) or static_shape(value) == static_shape(user.outputs[0])

    def prologue(self, head: ir.Node) -> list[ir.Node]:
        """The nodes that have waited for `head`."""
        sources = [value.producer() for value in head.inputs if value is not None]
        return [node for node in dict.fromkeys(sources) if node is not None and self.waits(node)]

    def view_chain(self, head: ir.Node) -> list[ir.Node]:
        """Views that follow each other, each the only user of the one before."""
        chain = [head]
        while len(chain) < MAX_NODES:
            value = chain[-1].outputs[0]
            users = {user for user, _ in value.uses()}
            follower = next(iter(users)) if len(users) == 1 else None
            if follower is None or value.is_graph_output() or follower not in self.position:
                break
            if not is_view(follower) or not _known(follower) or not self.ready(follower, set(chain)):
                break
            if follower in self.alone:
                break
            chain.append(follower)
        return chain

    def tail(self, prologue: list[ir.Node], head: ir.Node) -> list[ir.Node]:
        """`head` and the elementwise nodes after it, as long as only one value of theirs is used further on.

        What would be widened at the end stays narrow instead: whoever needs it widens it.
        """
        nodes = [*prologue, head]
        value = head.outputs[0]
        shape = static_shape(value)
        while len(nodes) < MAX_NODES and shape is not None and not value.is_graph_output():
            step = self.step(set(nodes), value, shape)
            if not step or len(nodes) + len(step) > MAX_NODES:
                break
            nodes += step
            value = step[-1].outputs[0]
        while nodes[-1] is not head and widens(nodes[-1]) and not nodes[-1].outputs[0].is_graph_output():
            nodes.pop()
        return nodes

    def step(self, inside: set[ir.Node], value: ir.Value, shape: tuple[int, ...]) -> list[ir.Node]:
        """The fewest nodes to add so that again one value, the last one's output, is all that is used outside."""
        added: list[ir.Node] = []
        live = [value]
        while len(added) < _LOOK_AHEAD:
            members = inside | set(added)
            users = {user for item in live for user, _ in item.uses()} - members
            grown = None
            for user in sorted(users, key=lambda node: self.position.get(node, -1)):
                grown = self.admit(user, members, shape, _PULL_DEPTH)
                if grown:
                    break
            if not grown:
                return []
            added += grown
            members.update(grown)
            live = [item for item in (value, *_outputs(added)) if _escapes(item, members)]
            if live == [added[-1].outputs[0]]:
                return added
        return []

    def admit(self, node: ir.Node, inside: set[ir.Node], shape: tuple[int, ...], depth: int) -> list[ir.Node]:
        """`node`, after those producers it needs to bring along, if it may join a region; else nothing."""
        if node not in self.position or node in self.done or node in self.alone:
            return []
        if not is_elementwise(node) or not _known(node):
            return []
        if static_shape(node.outputs[0]) != shape:
            return []
        brought: list[ir.Node] = []
        for operand in node.inputs:
            source = None if operand is None else operand.producer()
            if source is None or source in self.done or source in inside or source in brought:
                continue
            if depth == 0:
                return []
            more = self.admit(source, inside | set(brought), shape, depth - 1)
            if not more or _escapes(source.outputs[0], inside | set(brought) | set(more) | {node}):
                return []
            brought += more
        return [*brought, node]

    def widen(self, nodes: list[ir.Node]) -> None:
        """Take further elementwise nodes of the same shape into a group, whose values may then have users outside."""
        shape = static_shape(nodes[0].outputs[0])
        grown = True
        while grown and shape is not None:
            grown = False
            members = set(nodes)
            users = {user for value in _outputs(nodes) for user, _ in value.uses()} - members
            for user in sorted(users, key=lambda node: self.position.get(node, -1)):
                more = [] if widens(user) else self.admit(user, members, shape, _PULL_DEPTH)
                together = members | set(more)
                outputs = sum(_escapes(value, together) for value in (*_outputs(nodes), *_outputs(more)))
                if more and len(together) <= MAX_NODES and outputs <= MAX_OUTPUTS:
                    nodes += more
                    grown = True
                    break

    def ready(self, node: ir.Node, inside: set[ir.Node]) -> bool:
        """Whether all operands of a node are computed by earlier regions or inside this one."""
        sources = [value.producer() for value in node.inputs if value is not None]
        return all(source is None or source in self.done or source in inside for source in sources)


def _parameters_first(graph: ir.Graph) -> list[ir.Node]:
    """The nodes in an order in which they can run, elementwise ones of rank 0 or 1 as early as can be: the tail of an
    anchor may need them (the product of scales in dynamic quantization), and they cost nothing."""
    order: dict[ir.Node, None] = {}

    def ready(node: ir.Node) -> bool:
        sources = [value.producer() for value in node.inputs if value is not None]
        return all(source is None or source in order or source.graph is not graph for source in sources)

    for first in graph:
        placed = [first]
        while placed:
            node = placed.pop()
            if node in order or not ready(node):
                continue
            order[node] = None
            for user in dict.fromkeys(user for value in node.outputs for user, _ in value.uses()):
                shape = static_shape(user.outputs[0])
                if user.graph is graph and is_elementwise(user) and shape is not None and len(shape) <= 1:
                    placed.append(user)
    return list(order)


def _outputs(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    return [value for node in nodes for value in node.outputs]


def _escapes(value: ir.Value, inside: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(user not in inside for user, _ in value.uses())


def _known(node: ir.Node) -> bool:
    """Whether every operand and result is a dense tensor of numbers with a known shape."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and not _unused(value)]
    return all(
        isinstance(value.type, ir.TensorType) and value.dtype != ir.DataType.STRING and static_shape(value) is not None
        for value in values
        if not is_constant(value) or value.dtype == ir.DataType.STRING
    )


def _unused(value: ir.Value) -> bool:
    return value.producer() is not None and not value.uses() and not value.is_graph_output()
