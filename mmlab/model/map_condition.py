"""A picture's map as its condition: the codes that a second first stage makes of it. Legend: B pictures, D width."""

import torch
from torch import Tensor, nn

from mmlab.model.conditioner import Condition, Conditioner


class MapCondition(Conditioner):
    """One token for each code of a map (segmentation, depth), in raster order (Taming Transformers, section 3.2).

    A dropped row is the same further embedding at all places.

    Args:
        codes: of the first stage that encodes the maps.
        width: D of the embedding; rows start as normal numbers of standard deviation 0.02.
        dropout: see `Conditioner`.
    """

    reads = "map"
    unlearnt = True

    def __init__(self, codes: int, width: int, dropout: float = 0.1):
        super().__init__()
        self.codes, self.dropout, self.context_width = codes, dropout, width
        self.embedding = nn.Embedding(codes + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, given: dict[str, Tensor], drop_B: Tensor | None = None) -> Condition:
        """`given["map_codes"]`: int64 `[B, h, w]`; the context has h·w tokens."""
        codes_BN = given["map_codes"].flatten(1)
        if drop_B is not None:
            codes_BN = torch.where(drop_B[:, None], self.codes, codes_BN)
        return {"context": self.embedding(codes_BN)}

    def null(self, count: int, device: torch.device | str) -> Condition:
        """The null token alone; dropping all rows in `forward` gives as many as a map has."""
        return self({"map_codes": torch.full((count, 1, 1), self.codes, device=device)})
