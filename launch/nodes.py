"""How the ranks of a run lie on nodes, and what torchrun is told of it."""

from __future__ import annotations

from dataclasses import dataclass

from truedag.launch.errors import LaunchError


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchrunOptions:
    """torchrun's options as a person gave them; None: not given."""

    nnodes: str | None = None
    node_rank: int | None = None
    nproc_per_node: int | None = None
    rdzv_backend: str | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    rdzv_conf: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    local_addr: str | None = None

    def rendezvous(self) -> tuple[str, ...]:
        """Those that say how the nodes find each other, as torchrun takes them."""
        told = {
            "--rdzv-backend": self.rdzv_backend,
            "--rdzv-endpoint": self.rdzv_endpoint,
            "--rdzv-id": self.rdzv_id,
            "--rdzv-conf": self.rdzv_conf,
            "--master-addr": self.master_addr,
            "--master-port": self.master_port,
            "--local-addr": self.local_addr,
        }
        return tuple(f"{name}={value}" for name, value in told.items() if value is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nodes of a run, and which of them this is."""

    num_nodes: int
    node: int
    """This node, from 0."""

    ranks_per_node: int
    rendezvous: tuple[str, ...]
    """torchrun's options for finding the other nodes; none: this node alone."""

    @property
    def endpoint(self) -> str | None:
        """Where the nodes meet, as given: the option and its value; None: this node alone."""
        told = dict(option.split("=", maxsplit=1) for option in self.rendezvous)
        if "--rdzv-endpoint" in told:
            return f"--rdzv-endpoint {told['--rdzv-endpoint']}"
        if "--master-addr" in told:
            port = f" --master-port {told['--master-port']}" if "--master-port" in told else ""
            return f"--master-addr {told['--master-addr']}{port}"
        return None

    def torchrun_arguments(self) -> list[str]:
        """What torchrun is told."""
        if not self.rendezvous:
            return ["--standalone", f"--nproc-per-node={self.ranks_per_node}"]
        placing = [f"--nnodes={self.num_nodes}", f"--nproc-per-node={self.ranks_per_node}"]
        if "--rdzv-backend=c10d" not in self.rendezvous:  # c10d numbers the nodes itself
            placing.append(f"--node-rank={self.node}")
        return [*placing, *self.rendezvous]


def place_ranks(options: TorchrunOptions, world_size: int) -> Nodes:
    """Lay the ranks out over the nodes: the same number on each.

    Raises:
        LaunchError: the numbers do not fit, or the nodes cannot find each other.
    """
    num_nodes, ranks_per_node = divide_ranks(options.nnodes, options.nproc_per_node, world_size)
    rendezvous = options.rendezvous()
    if num_nodes > 1:
        if options.rdzv_endpoint is None and options.master_addr is None:
            raise LaunchError(
                f"--nnodes {num_nodes}: the nodes must find each other: give all the same --rdzv-endpoint HOST:PORT, "
                "with node 0's host and a free port there"
            )
        if options.node_rank is None:
            raise LaunchError(
                f"--nnodes {num_nodes}: say which node this is: --node-rank 0 to --node-rank {num_nodes - 1}"
            )
    elif rendezvous and options.rdzv_endpoint is None and options.master_addr is None:
        raise LaunchError(f"{rendezvous[0]} needs an address: --rdzv-endpoint HOST:PORT")
    node = options.node_rank or 0
    if not 0 <= node < num_nodes:
        raise LaunchError(f"--node-rank {node}: with --nnodes {num_nodes} it is 0 to {num_nodes - 1}")
    return Nodes(num_nodes=num_nodes, node=node, ranks_per_node=ranks_per_node, rendezvous=rendezvous)


def divide_ranks(nnodes: str | None, nproc_per_node: int | None, world_size: int) -> tuple[int, int]:
    """Return the number of nodes and of ranks on each; what is not given follows from what is, or is one node.

    Raises:
        LaunchError: they do not make up the world size; the message has the nearest numbers that do.
    """
    if nnodes is not None and (not nnodes.isdecimal() or int(nnodes) < 1):
        raise LaunchError(f"--nnodes {nnodes}: a deployment has a fixed number of ranks; give one number, from 1")
    if nproc_per_node is not None and nproc_per_node < 1:
        raise LaunchError(f"--nproc-per-node {nproc_per_node}: give a number from 1")
    if nnodes is None and nproc_per_node is None:
        return 1, world_size
    if nnodes is None:
        assert nproc_per_node is not None
        num_nodes, ranks_per_node = 1, nproc_per_node
    else:
        num_nodes = int(nnodes)
        ranks_per_node = nproc_per_node if nproc_per_node is not None else world_size // num_nodes
    if num_nodes * ranks_per_node == world_size:
        return num_nodes, ranks_per_node
    given = f"--nnodes {num_nodes}" + (f" --nproc-per-node {nproc_per_node}" if nproc_per_node is not None else "")
    nearest_nodes, nearest_ranks = _nearest(num_nodes, nproc_per_node, world_size)
    raise LaunchError(
        f"{given}: the deployment has {world_size} ranks, the same number on each node; "
        f"nearest: --nnodes {nearest_nodes} --nproc-per-node {nearest_ranks}"
    )


def _nearest(num_nodes: int, ranks_per_node: int | None, world_size: int) -> tuple[int, int]:
    divisors = [number for number in range(1, world_size + 1) if world_size % number == 0]
    if ranks_per_node is not None and ranks_per_node in divisors:
        return world_size // ranks_per_node, ranks_per_node
    nearest = min(divisors, key=lambda number: abs(number - num_nodes))
    return nearest, world_size // nearest
