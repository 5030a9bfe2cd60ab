"""Rotation matrices from the formulas, position by position, in float64 NumPy. Shares no code with the package."""
import itertools
import math
import random
import statistics

import numpy as np


def coordinates(size, reference, coords, span, centered):
    """Coordinate of each of `size` positions along one axis."""
    return [coordinate(i, size, reference, coords, span, centered) for i in range(size)]


def coordinate(place, size, reference, coords, span, centered, offset=0.0):
    """Coordinate of any place, in patches, along an axis of `size` patches."""
    if coords == 'index':
        return float(place) + offset
    if coords == 'eva':
        return (place + offset) / size * reference
    if coords.startswith('dinov3'):  # whatever the reference grid
        return span * ((place + 0.5) / size + offset) - (0.5 * span if centered else 0.0)
    if coords == 'cells':
        image = (place + 0.5) / reference
    else:
        image = size / reference * place / (size - 1) if size > 1 else (place + 0.5) / reference
    shift = 0.5 * size / reference if centered else 0.0
    return span * (image - shift + offset * size / reference)


def turn(angle):
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def pairs(head_dim, angles):
    """Block-diagonal matrix of planar rotations on channels (2g, 2g+1)."""
    matrix = np.eye(head_dim)
    for g, angle in enumerate(angles):
        matrix[2 * g:2 * g + 2, 2 * g:2 * g + 2] = turn(angle)
    return matrix


def triplets(head_dim, angles, order):
    """By x channels (3g, 3g+1) turn, a yaw, by y (3g+1, 3g+2), a roll, by z (3g+2, 3g); order 'yx': the roll first."""
    matrix = np.eye(head_dim)
    for g, of_group in enumerate(zip(*angles)):
        for axis in order:
            number = 'xyz'.index(axis)
            one, channels = np.eye(3), [(0, 1), (1, 2), (2, 0)][number]
            one[np.ix_(channels, channels)] = turn(of_group[number])
            place = slice(3 * g, 3 * g + 3)
            matrix[place, place] = one @ matrix[place, place]
    return matrix


def skew_exponential(matrix):
    """Exponential of a skew-symmetric matrix through the eigenvectors of the Hermitian i * matrix."""
    values, vectors = np.linalg.eigh(1j * matrix)
    return (vectors @ np.diag(np.exp(-1j * values)) @ vectors.conj().T).real


def blocks(head_dim, size, triangles, p):
    """exp(x A_x + y A_y + ...) on each block; triangles hold the strict upper triangle row by row, for every axis."""
    matrix = np.eye(head_dim)
    for g, of_axes in enumerate(zip(*triangles)):
        a, k = np.zeros((size, size)), 0
        for i in range(size):
            for j in range(i + 1, size):
                a[i, j] = sum(c * triangle[k] for c, triangle in zip(p, of_axes))
                a[j, i] = -a[i, j]
                k += 1
        matrix[g * size:(g + 1) * size, g * size:(g + 1) * size] = skew_exponential(a)
    return matrix


def quaternion(vector):
    """Exponential of an imaginary quaternion."""
    half = math.sqrt(sum(v * v for v in vector))
    return np.array([math.cos(half), *(v * (math.sin(half) / half if half else 1.) for v in vector)])


def hamilton(p, q):
    """Product of two quaternions, real part and vector by scalar and vector products."""
    return np.array([p[0] * q[0] - p[1:] @ q[1:], *(p[0] * q[1:] + q[0] * p[1:] + np.cross(p[1:], q[1:]))])


def triplets_of_space(head_dim, turns):
    """Matrix that makes r v r* of triplets v, for one unit quaternion r each."""
    matrix = np.eye(head_dim)
    for g, r in enumerate(turns):
        back = r * [1, -1, -1, -1]
        columns = [hamilton(hamilton(r, np.array([0., *unit])), back)[1:] for unit in np.eye(3)]
        matrix[3 * g:3 * g + 3, 3 * g:3 * g + 3] = np.stack(columns, -1)
    return matrix


def spiral_angles(dim, options, grid, row, column):
    """Angle of every pair: theta times the position along a turned axis, cut off at the border if clamped."""
    quarter, turns = dim // 4, options['directions'] // 2
    angles = []
    for pair in range(2 * quarter):
        theta = options['scale'] * options['temperature'] ** (-(pair % quarter) / quarter)
        alpha = math.radians(90 * ((pair // 2) % turns) / turns)
        middle = [(size - 1) / 2 if options['clamp'] else 0 for size in grid]
        down, right = row - middle[0], column - middle[1]
        if pair < quarter:
            axis, position = 0, middle[0] + math.cos(alpha) * down + math.sin(alpha) * right
        else:
            axis, position = 1, middle[1] + math.cos(alpha) * right - math.sin(alpha) * down
        if options['clamp']:
            position = min(max(position, 0), grid[axis] - 1)
        angles.append(theta * position)
    return angles


# -- one function for each encoding: (D, D), the matrix of a head at one position

FORMULAS = {}
FRAMES = {}  # length of the reference image in normalised coordinates, and whether their origin is in its middle


def formula(*names, span=2 * math.pi, centered=True):
    """Register the formula of encodings, called with a `Place`."""
    def register(function):
        FORMULAS.update(dict.fromkeys(names, function))
        FRAMES.update(dict.fromkeys(names, (span, centered)))
        return function

    return register


class Place:
    """What a formula may know: sizes and options of an encoding, learned values of one layer and head, a position.

    The position is p, in coordinates of the encoding with the last first: (x, y), or (x,), or (x, y, z).
    """

    def __init__(self, rope, grid, layer, head):
        self.dim, self.options, self.grid = rope.head_dim, rope.options, grid
        learned = rope.freqs.detach().double().cpu().numpy() if rope.learned else None
        self.all_learned, self.layer, self.head = learned, layer, head
        self.dims, self.p = rope.reference_grid.numel(), None

    def pick(self, table):
        """The entry of this layer and head of (L or 1, H or 1, ...)."""
        return table[self.layer if table.shape[0] > 1 else 0][self.head if table.shape[1] > 1 else 0]

    @property
    def learned(self):
        """Learned values of x, of y, ..."""
        return None if self.all_learned is None else [self.pick(table) for table in self.all_learned]

    def series(self, count):
        return [self.options.get('scale', 1.) * self.options['temperature'] ** (-g / count) for g in range(count)]


@formula('axial')
def axial(at):
    w = at.series(at.dim // (2 * at.dims))
    return pairs(at.dim, [c * f for c in at.p for f in w])


@formula('uniform')
def uniform(at):
    return pairs(at.dim, [c for c in at.p for _ in range(at.dim // (2 * at.dims))])


@formula('axial_learned')
def axial_learned(at):
    w, = at.learned
    return pairs(at.dim, [c * f for c, part in zip(at.p, np.split(w, at.dims)) for f in part])


@formula('mixed')
def mixed(at):
    return pairs(at.dim, [np.dot(at.p, wave) for wave in zip(*at.learned)])


@formula('spherical', 'spherical_learned')
def spherical(at):
    frequencies = at.learned or [at.series(at.dim // 3)] * at.dims
    return triplets(at.dim, [[c * f for f in w] for c, w in zip(at.p, frequencies)], at.options['order'])


@formula('spiral')
def spiral(at):
    x, y = at.p
    return pairs(at.dim, spiral_angles(at.dim, at.options, at.grid, y, x))


@formula('golden', span=2.)
def golden(at):
    pairs_of_head, options = at.dim // 2, at.options
    zeros = round(pairs_of_head * options['p_zero_freqs'])
    turning = np.geomspace(options['min_freq'], options['max_freq'], pairs_of_head - zeros)
    golden_ratio = (1 + math.sqrt(5)) / 2
    angles = []
    for i, w in enumerate([0.] * zeros + turning.tolist()):
        number = at.head * pairs_of_head + i
        if at.dims == 2:
            phi = number * math.pi / golden_ratio
            direction = np.array([math.cos(phi), math.sin(phi)])
        else:  # normal numbers from the sequence whose steps are powers of the root of g^(D + 1) = g + 1
            generalised = max(np.roots([1, *[0] * (at.dims - 1), -1, -1]).real)
            even = [(number + 1) * generalised ** -(axis + 1) % 1 for axis in range(at.dims)]
            direction = np.array([statistics.NormalDist().inv_cdf(u) for u in even])
        angles.append(w * np.dot(at.p, direction / np.linalg.norm(direction)))
    return pairs(at.dim, angles)


@formula('nd')
def nd(at):
    draw = random.Random(at.options['seed'])
    for _ in range(at.head + 1):
        if at.dims == 2:
            first = draw.uniform(0, 360)
            corners = [[math.cos(math.radians(first + a)), math.sin(math.radians(first + a))] for a in (0, 120, 240)]
        elif at.dims == 1:
            corners = [[1.], [-1.]]
        else:  # every second corner of a cube, turned by a random quaternion
            u, *angles = draw.random(), draw.uniform(0, 360), draw.uniform(0, 360)
            a, b = ([math.sin(math.radians(angle)), math.cos(math.radians(angle))] for angle in angles)
            q = np.array([a[0] * (1 - u) ** 0.5, a[1] * (1 - u) ** 0.5, b[0] * u ** 0.5, b[1] * u ** 0.5])
            cube = [[s, t, s * t] for s in (1, -1) for t in (1, -1)]
            corners = [triplets_of_space(3, [q]) @ corner / 3 ** 0.5 for corner in cube]
    return pairs(at.dim, [w * np.dot(at.p, c) for w in at.series(at.dim // (2 * at.dims + 2)) for c in corners])


@formula('liere', span=1., centered=False)
def liere(at):
    size = at.options['block']
    count = at.dim // size
    values = at.all_learned.reshape(at.dims, at.all_learned.shape[1], -1, count, size * (size - 1) // 2)
    return blocks(at.dim, size, [at.pick(along) for along in values], at.p)


@formula('comrope', span=1., centered=False)
def comrope(at):
    size, one_axis = at.options['block'], at.options['variant'] == 'ap'
    count, entries = at.dim // size, size * (size - 1) // 2
    values = at.all_learned[0]
    rows = at.pick(values.reshape(values.shape[0], -1, count, values.shape[-1]))
    # the first block turns with the first number of a position, which is the last of p
    steps = [np.eye(at.dims)[::-1][g % at.dims] if one_axis else row[entries:] for g, row in enumerate(rows)]
    along = [[step[axis] * row[:entries] for step, row in zip(steps, rows)] for axis in range(at.dims)]
    return blocks(at.dim, size, along, at.p)


@formula('geope')
def geope(at):
    turns = []
    units = np.eye(3)[[1, 0, 2]]  # x turns about j, y about i, z about k, each by half an angle
    for w in at.series(at.dim // 3):
        turns.append(quaternion(np.mean([c * w / 2 * unit for c, unit in zip(at.p, units)], axis=0)))
    return triplets_of_space(at.dim, turns)


@formula('quatro')
def quatro(at):
    count = at.dim // 3
    values = at.all_learned.reshape(at.dims, at.all_learned.shape[1], -1, count, 3)
    turns = []
    for axes in zip(*(at.pick(axes) for axes in values)):
        r = np.array([1., 0., 0., 0.])
        for number in map('xyz'.index, at.options['order']):
            r = hamilton(quaternion(axes[number] * at.p[number] / 2), r)
        turns.append(r)
    return triplets_of_space(at.dim, turns)


@formula('string')
def string(at):
    size = at.options['block']
    count, matrix = at.dim // size, np.eye(at.dim)
    learned = at.all_learned.reshape(*at.all_learned.shape[:2], -1, count, at.all_learned.shape[-1])
    for g in range(count):
        values = [at.pick(table)[g] for table in learned]
        if at.options['basis'] == 'circulant':  # a circulant matrix multiplies the Fourier transform
            half, column = np.dot(at.p, values), np.zeros(size)
            column[1:len(half) + 1] = half
            column -= np.roll(column[::-1], 1)
            turned = np.fft.ifft(np.exp(np.fft.fft(column))).real
            block = [[turned[(i - j) % size] for j in range(size)] for i in range(size)]
        else:
            of_waves = size // 2 * at.dims
            waves, s = values[0][:of_waves].reshape(at.dims, -1), np.zeros((size, size))
            s[np.triu_indices(size, 1)] = values[0][of_waves:]
            s -= s.T
            basis = (np.eye(size) - s) @ np.linalg.inv(np.eye(size) + s)
            block = basis @ pairs(size, np.dot(at.p, waves)) @ basis.T
        matrix[g * size:(g + 1) * size, g * size:(g + 1) * size] = block
    return matrix


def rotations(rope, grid, layer, head):
    """(N, D, D) matrices of an encoding, from its name, options and learned values alone."""
    return rotations_at(rope, list(itertools.product(*map(range, grid))), grid, layer, head)


def rotations_at(rope, points, grid, layer, head):
    """The same at points (row, column), or of as many numbers as the grid has sizes, in units of its patches."""
    if rope.name not in FORMULAS:
        raise NotImplementedError(f'write the formula of {rope.name!r} in tests/oracle.py, under @formula')
    span, centered = FRAMES[rope.name]
    reference, coords = rope.reference_grid.tolist(), rope.options['coords']
    sides = {'dinov3_min': [min(grid)] * len(grid), 'dinov3_max': [max(grid)] * len(grid)}.get(coords, grid)
    at = Place(rope, grid, layer, head)
    out = []
    for point in points:
        places = zip(point, sides, reference)
        offset = rope.options.get('offset', 0.)
        at.p = [coordinate(c, size, of, coords, span, centered, offset) for c, size, of in places][::-1]
        out.append(FORMULAS[rope.name](at))
    return np.stack(out)


def rotate(x, matrices):
    """x (N, D) float64, matrices (N, D, D)."""
    return np.einsum('nij,nj->ni', matrices, x)
