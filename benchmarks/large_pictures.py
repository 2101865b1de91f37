"""Contest: as `pictures`, with JPEGs of 12 megapixels.

python benchmarks/large_pictures.py [ROUNDS]
"""

from contest import main
from pictures import contest

CONTEST = contest("pictures, 12 MP", 4000, 3000, 96, {"mmlab": 4, "mmlab, reduced": 4})

if __name__ == "__main__":
    main(CONTEST)
