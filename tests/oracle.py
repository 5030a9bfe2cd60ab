"""Rotation matrices from the formulas, position by position, in float64 NumPy. Shares no code with the package."""
import math
import random

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


def triplets(head_dim, yaw, roll, order):
    """Yaw on channels (3g, 3g+1), roll on (3g+1, 3g+2); order 'yx': the roll by y acts first."""
    matrix = np.eye(head_dim)
    for g, (a, b) in enumerate(zip(yaw, roll)):
        y, r = np.eye(3), np.eye(3)
        y[:2, :2] = turn(a)
        r[1:, 1:] = turn(b)
        matrix[3 * g:3 * g + 3, 3 * g:3 * g + 3] = y @ r if order == 'yx' else r @ y
    return matrix


def skew_exponential(matrix):
    """Exponential of a skew-symmetric matrix through the eigenvectors of the Hermitian i * matrix."""
    values, vectors = np.linalg.eigh(1j * matrix)
    return (vectors @ np.diag(np.exp(-1j * values)) @ vectors.conj().T).real


def blocks(head_dim, size, triangles_x, triangles_y, x, y):
    """exp(x A_x + y A_y) on each block; triangles hold the strict upper triangle row by row."""
    matrix = np.eye(head_dim)
    for g, (tx, ty) in enumerate(zip(triangles_x, triangles_y)):
        a, k = np.zeros((size, size)), 0
        for i in range(size):
            for j in range(i + 1, size):
                a[i, j] = x * tx[k] + y * ty[k]
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
    """What a formula may know: sizes and options of an encoding, learned values of one layer and head, a position."""

    def __init__(self, rope, grid, layer, head):
        self.dim, self.options, self.grid = rope.head_dim, rope.options, grid
        learned = rope.freqs.detach().double().cpu().numpy() if rope.learned else None
        self.all_learned, self.layer, self.head = learned, layer, head
        self.x = self.y = 0.

    def pick(self, table):
        """The entry of this layer and head of (L or 1, H or 1, ...)."""
        return table[self.layer if table.shape[0] > 1 else 0][self.head if table.shape[1] > 1 else 0]

    @property
    def learned(self):
        """Learned values of x and of y."""
        return None if self.all_learned is None else [self.pick(table) for table in self.all_learned]

    def series(self, count):
        return [self.options.get('scale', 1.) * self.options['temperature'] ** (-g / count) for g in range(count)]


@formula('axial')
def axial(at):
    w = at.series(at.dim // 4)
    return pairs(at.dim, [at.x * f for f in w] + [at.y * f for f in w])


@formula('uniform')
def uniform(at):
    return pairs(at.dim, [at.x] * (at.dim // 4) + [at.y] * (at.dim // 4))


@formula('axial_learned')
def axial_learned(at):
    w, = at.learned
    half = len(w) // 2
    return pairs(at.dim, [at.x * f for f in w[:half]] + [at.y * f for f in w[half:]])


@formula('mixed')
def mixed(at):
    return pairs(at.dim, [at.x * fx + at.y * fy for fx, fy in zip(*at.learned)])


@formula('spherical', 'spherical_learned')
def spherical(at):
    wx, wy = at.learned or [at.series(at.dim // 3)] * 2
    return triplets(at.dim, [at.x * f for f in wx], [at.y * f for f in wy], at.options['order'])


@formula('spiral')
def spiral(at):
    return pairs(at.dim, spiral_angles(at.dim, at.options, at.grid, at.y, at.x))


@formula('golden', span=2.)
def golden(at):
    pairs_of_head, options = at.dim // 2, at.options
    zeros = round(pairs_of_head * options['p_zero_freqs'])
    turning = np.geomspace(options['min_freq'], options['max_freq'], pairs_of_head - zeros)
    golden_ratio = (1 + math.sqrt(5)) / 2
    angles = []
    for i, w in enumerate([0.] * zeros + turning.tolist()):
        phi = (at.head * pairs_of_head + i) * math.pi / golden_ratio
        angles.append(w * (at.x * math.cos(phi) + at.y * math.sin(phi)))
    return pairs(at.dim, angles)


@formula('nd')
def nd(at):
    scales, angles = at.dim // 6, []
    draw = random.Random(at.options['seed'])
    turn_of_head = [draw.uniform(0, 360) for _ in range(at.head + 1)][-1]
    for w in at.series(scales):
        for corner in (0, 120, 240):
            phi = math.radians(turn_of_head + corner)
            angles.append(w * at.x * math.cos(phi) + w * at.y * math.sin(phi))
    return pairs(at.dim, angles)


@formula('liere', span=1., centered=False)
def liere(at):
    size = at.options['block']
    count = at.dim // size
    along_x, along_y = at.all_learned.reshape(2, at.all_learned.shape[1], -1, count, size * (size - 1) // 2)
    return blocks(at.dim, size, at.pick(along_x), at.pick(along_y), at.x, at.y)


@formula('comrope', span=1., centered=False)
def comrope(at):
    size, one_axis = at.options['block'], at.options['variant'] == 'ap'
    count, entries = at.dim // size, size * (size - 1) // 2
    values = at.all_learned[0]
    rows = at.pick(values.reshape(values.shape[0], -1, count, values.shape[-1]))
    steps = [(g % 2, 1 - g % 2) if one_axis else row[entries:] for g, row in enumerate(rows)]
    along_x, along_y = ([step[axis] * row[:entries] for step, row in zip(steps, rows)] for axis in (0, 1))
    return blocks(at.dim, size, along_x, along_y, at.x, at.y)


@formula('geope')
def geope(at):
    turns = []
    for w in at.series(at.dim // 3):
        mean = [at.y * w / 4, at.x * w / 4, 0.]  # of the logarithms: half an angle along i, half of one along j
        turns.append(quaternion(mean))
    return triplets_of_space(at.dim, turns)


@formula('quatro')
def quatro(at):
    count = at.dim // 3
    values = at.all_learned.reshape(2, at.all_learned.shape[1], -1, count, 3)
    turns = []
    for a_x, a_y in zip(*(at.pick(axes) for axes in values)):
        by_x, by_y = quaternion(a_x * at.x / 2), quaternion(a_y * at.y / 2)
        turns.append(hamilton(by_x, by_y) if at.options['order'] == 'yx' else hamilton(by_y, by_x))
    return triplets_of_space(at.dim, turns)


@formula('string')
def string(at):
    size = at.options['block']
    count, matrix = at.dim // size, np.eye(at.dim)
    learned = at.all_learned.reshape(*at.all_learned.shape[:2], -1, count, at.all_learned.shape[-1])
    for g in range(count):
        values = [at.pick(table)[g] for table in learned]
        if at.options['basis'] == 'circulant':  # a circulant matrix multiplies the Fourier transform
            half, column = values[0] * at.x + values[1] * at.y, np.zeros(size)
            column[1:len(half) + 1] = half
            column -= np.roll(column[::-1], 1)
            turned = np.fft.ifft(np.exp(np.fft.fft(column))).real
            block = [[turned[(i - j) % size] for j in range(size)] for i in range(size)]
        else:
            waves, s = values[0][:size // 2 * 2].reshape(2, -1), np.zeros((size, size))
            s[np.triu_indices(size, 1)] = values[0][size // 2 * 2:]
            s -= s.T
            basis = (np.eye(size) - s) @ np.linalg.inv(np.eye(size) + s)
            block = basis @ pairs(size, waves[0] * at.x + waves[1] * at.y) @ basis.T
        matrix[g * size:(g + 1) * size, g * size:(g + 1) * size] = block
    return matrix


def rotations(rope, grid, layer, head):
    """(N, D, D) matrices of an encoding, from its name, options and learned values alone."""
    return rotations_at(rope, [(i, j) for i in range(grid[0]) for j in range(grid[1])], grid, layer, head)


def rotations_at(rope, points, grid, layer, head):
    """The same at points (row, column) in units of patches of a grid."""
    if rope.name not in FORMULAS:
        raise NotImplementedError(f'write the formula of {rope.name!r} in tests/oracle.py, under @formula')
    span, centered = FRAMES[rope.name]
    reference, coords = rope.reference_grid.tolist(), rope.options['coords']
    sides = {'dinov3_min': [min(grid)] * 2, 'dinov3_max': [max(grid)] * 2}.get(coords, grid)
    at = Place(rope, grid, layer, head)
    out = []
    for row, column in points:
        at.y, at.x = (
            coordinate(place, sides[axis], reference[axis], coords, span, centered, rope.options.get('offset', 0.))
            for axis, place in enumerate((row, column)))
        out.append(FORMULAS[rope.name](at))
    return np.stack(out)


def rotate(x, matrices):
    """x (N, D) float64, matrices (N, D, D)."""
    return np.einsum('nij,nj->ni', matrices, x)
