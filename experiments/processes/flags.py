"""Flags that say which of several processes this one is. No JAX import."""

import dataclasses
from typing import Annotated

from cyclopts import Parameter

from experiments.config import ConfigError, TrainConfig, at_least


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessFlags:
    """Which of several processes this one is; each may come from the environment.

    Attributes:
      coordinator: Address of the first process, host:port; all others connect to it.
      processes: Number of processes.
      process_id: Number of this process; process 0 writes the record.
      join_seconds: Seconds to wait for the other processes.
    """

    coordinator: Annotated[str | None, Parameter(env_var="JAX_COORDINATOR_ADDRESS")] = None
    processes: Annotated[int, Parameter(env_var="JAX_NUM_PROCESSES")] = 1
    process_id: Annotated[int | None, Parameter(env_var="JAX_PROCESS_ID")] = None
    join_seconds: float = 300.0

    def __post_init__(self):
        at_least(self, 1, "processes")
        if not self.join_seconds > 0:
            raise ConfigError(f"join_seconds is {self.join_seconds}; it is above 0")
        if self.processes == 1:
            return
        if self.coordinator is None or self.process_id is None:
            raise ConfigError(
                f"{self.processes} processes need --coordinator host:port and --process-id, or "
                "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID in the environment"
            )
        if not 0 <= self.process_id < self.processes:
            raise ConfigError(
                f"process_id is {self.process_id}; of {self.processes} processes it is 0 to "
                f"{self.processes - 1}"
            )
        _ = self.address  # raises for an invalid address

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = (self.coordinator or "").rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"coordinator {self.coordinator!r} is no host:port")
        return host.strip("[]"), int(port)

    def check(self, config: TrainConfig):
        """Raises `ConfigError` for a setting that several processes cannot share."""
        if self.processes == 1:
            return
        if config.mesh is None:
            raise ConfigError(
                f"{self.processes} processes share one --mesh, such as data={self.processes}"
            )
        if config.out is None:
            raise ConfigError("several processes need --out, one folder that all of them see")
        if config.sample:
            raise ConfigError("--sample is for one process; leave it out")
