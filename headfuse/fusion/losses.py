"""Energy that fused heads lose, in closed form."""

from __future__ import annotations

import torch

from headfuse.fusion.maps import HeadMaps
from headfuse.fusion.moments import KeyMoments, ValueMoments
from headfuse.plan import Groups


def lost_key_energy(maps: HeadMaps, groups: Groups, moments: KeyMoments) -> float:
    """Energy that the fused keys lose, weighted by the energy of the queries (mathematics.md section 8.2)."""
    frequencies, lost = moments.gram.shape[0], 0.0
    for group in groups:
        if len(group) > 1:
            index, own = list(group), moments.of(group)
            write, read = maps.write[index][:, :, :frequencies], maps.read[index]
            product = torch.complex(  # R_i P_j on each plane, [F, g, g]
                torch.einsum("ifb,jbf->fij", read[:, :frequencies], write),
                torch.einsum("ifb,jbf->fij", read[:, frequencies : 2 * frequencies], write),
            )
            residual = torch.eye(len(group)) - product
            errors = torch.einsum("fij,fjk,fik->fi", residual, own.gram, residual.conj()).real
            lost += float((errors * own.query_energy.T).sum())
    if moments.tail is not None:
        rest = slice(2 * frequencies, None)
        lost += lost_value_energy(HeadMaps(maps.write[:, rest, rest], maps.read[:, rest, rest]), groups, moments.tail)
    return max(lost, 0.0)


def lost_value_energy(maps: HeadMaps, groups: Groups, moments: ValueMoments) -> float:
    """Energy of the attention output that the fused values lose (mathematics.md section 8.2)."""
    d, lost = moments.output_gram.shape[1], 0.0
    for group in groups:
        if len(group) > 1:
            index, g, own = list(group), len(group), moments.of(group)
            write = maps.write[index].transpose(0, 1).reshape(d, g * d)  # [d, g d]
            read, covariance = maps.read[index].reshape(g * d, d), own.covariance.reshape(g * d, g * d)
            rest = covariance - read @ (write @ covariance)  # (I - R P) C
            residual = torch.eye(g * d, dtype=torch.float64) - read @ write
            errors = rest.view(g, d, g * d) @ residual.view(g, d, g * d).mT  # [g, d, d]
            lost += float((errors * own.output_gram).sum())
    return max(lost, 0.0)
