"""The words that the suite and its prose are made of: lower-case, one word each, no word twice in a list."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


THINGS: tuple[str, ...] = _words(
    """
    anchor apple apron arrow axe bag barrel basket basin bead bell belt bench blanket bolt book boot bottle bow bowl
    box bread brick bridge broom brush bucket button cable cage cake camera candle cap card carpet cart chain chair
    chalk cheese chest clock cloth coat coin comb compass cone cork crate crown cup curtain cushion desk dice dish doll
    door drum easel engine fan feather fence flag flask flute fork frame funnel gate glass globe glove hammer harp hat
    helmet honey hook horn jar jug kettle key kite knife ladder lamp lantern leaf lemon lens letter lock loom magnet
    map mask mat mirror mug nail needle net oar olive onion oven pan paper pear pen pepper piano pillow pin pipe plate
    plough pot pulley purse quilt rake ribbon ring rope rug sack saddle sail salt saw scarf scissors screw shawl shell
    shield shoe shovel sickle sieve soap sock spade spear spoon stamp stool stove straw string sword table tent thread
    ticket tile tin torch towel tray trumpet trunk umbrella vase violin wagon wheel whistle window wreath
    """
)
"""Keys of joint recall and of needles, names of variables, and what the prose is furnished with."""

PLACES: tuple[str, ...] = _words(
    """
    Accra Algiers Amman Ankara Antwerp Athens Baku Bamako Bangkok Basel Beirut Belfast Belgrade Bergen Berlin Bern
    Bogota Bologna Boston Bremen Brisbane Brussels Budapest Cairo Calgary Cardiff Chicago Cologne Cork Dakar Dallas
    Damascus Delhi Denver Detroit Dhaka Dresden Dublin Durban Edinburgh Florence Galway Geneva Genoa Ghent Glasgow
    Granada Hamburg Hanoi Havana Helsinki Houston Istanbul Izmir Jakarta Kabul Kampala Karachi Kingston Krakow Kyoto
    Lagos Leeds Leipzig Lima Lisbon Liverpool London Lusaka Lyon Madrid Malaga Manila Maputo Marseille Melbourne Miami
    Milan Minsk Montreal Moscow Mumbai Munich Nagoya Nairobi Nantes Naples Oslo Ottawa Oxford Palermo Paris Perth
    Porto Prague Quito Rabat Riga Rome Rotterdam Salzburg Santiago Seoul Seville Sofia Stockholm Sydney Taipei Tampere
    Tehran Tirana Tokyo Toronto Tunis Turin Utrecht Valencia Vancouver Venice Verona Vienna Vilnius Warsaw York Zagreb
    Zurich
    """
)
"""Contexts of joint recall, and homes of the people in the prose."""

ADJECTIVES: tuple[str, ...] = _words(
    """
    amber ancient bent big bitter black blue blunt bold brass brave bright brittle broad broken brown calm carved cheap
    clean clear clever coarse cold copper crimson crooked curved damp dark deep dense dim dry dull dusty early empty
    faded faint fancy fine flat foreign fresh frozen gentle golden grand green grey hollow honest humble iron ivory
    large lazy light little lively long loud lucky marble mild narrow neat new noble old pale patient plain polished
    proud pure quick quiet rare red rough round royal rusty sharp short shy silent silver simple slender slow small
    smooth soft solid sour spare square steady stiff stout strange striped strong sturdy sweet tall thick thin tidy
    tiny warm wet white wide wild wise wooden yellow young
    """
)
"""What tells two things of one name apart."""

PEOPLE: tuple[str, ...] = _words(
    """
    Ada Agnes Alan Alba Albert Alice Amos Anna Anton Arthur Astrid Basil Beatrice Bella Boris Bruno Carl Carmen Cecil
    Clara Conrad Cora Cyril Daisy Daniel David Della Diana Dora Edgar Edith Edmund Elena Elias Elsa Emil Emma Erik
    Esther Eva Felix Fiona Flora Frank Frida Gabriel George Gerda Gilbert Gloria Grace Greta Gustav Hannah Harold
    Hazel Hector Helen Henry Hilda Hugo Ida Igor Ingrid Irene Iris Ivan Jacob Jane Jasper Joan Jonas Judith Julia
    Karin Klara Laura Leo Lena Lewis Lily Linus Lucy Ludwig Luna Mabel Magnus Marcus Martha Mary Max Mildred Mina Mona
    Nadia Nathan Nellie Nina Noah Nora Olaf Olga Oliver Oscar Otto Pablo Paula Pearl Peter Petra Philip Rachel Ralph
    Rita Robert Rosa Ruby Rufus Ruth Samuel Sara Selma Silas Simon Sonia Stella Sven Theo Thomas Tilda Ursula Vera
    Victor Viola Walter Wanda Wilma Xenia Yvonne Zelda
    """
)

SURNAMES: tuple[str, ...] = _words(
    """
    Abbot Archer Baker Barnes Becker Bishop Brandt Brewer Carver Castle Clay Cole Cooper Cross Dale Draper Farmer
    Fields Fisher Fletcher Ford Foster Fowler Frost Gardner Glover Green Hale Harper Hill Holm Hunt Keller Kern Knight
    Lake Lang Lind Marsh Mason Mercer Miller Moore Nash North Page Parker Perry Piper Porter Potter Reed Rivers Sawyer
    Shaw Shepherd Skinner Slater Smith Stone Strand Tanner Taylor Thorn Tucker Turner Vance Walker Ward Waters Weaver
    Webb Wells West Winter Wolf Wood Wright
    """
)

JOBS: tuple[str, ...] = _words(
    """
    actor baker barber beekeeper bookbinder brewer builder butcher carpenter clerk cobbler cook dancer dentist diver
    doctor dyer farmer ferryman fiddler fisher florist gardener gilder glazier grocer guard hatter hunter innkeeper
    jeweller joiner judge lawyer locksmith mason merchant midwife miller miner nurse painter pilot plumber poet porter
    potter printer sailor sculptor shepherd singer smith surveyor tailor tanner teacher tinker translator watchmaker
    weaver
    """
)

ANIMALS: tuple[str, ...] = _words(
    """
    badgers bees camels cats crows deer dogs donkeys doves ducks foxes frogs geese goats hares hens horses llamas mice
    moths otters owls oxen parrots pigs pigeons ponies rabbits ravens rats seals sheep snails sparrows spiders swans
    toads tortoises turkeys wolves
    """
)

FOODS: tuple[str, ...] = _words(
    """
    almonds apricots barley beans berries biscuits butter cabbage carrots cherries chestnuts chocolate cider corn
    cucumbers dates dumplings figs fish garlic ginger grapes ham jam leeks lentils melons milk mushrooms mustard noodles
    nuts oats oranges pancakes peaches peas pickles plums porridge potatoes pumpkin radishes raisins rice sausages soup
    spinach tea toast tomatoes turnips walnuts
    """
)

TRADES: tuple[str, ...] = _words(
    """
    amber bells bricks bridges candles canals carpets clocks coal copper cotton gardens glass gold granite hats honey
    horses ink iron lace lamps leather linen maps marble markets mills music olives orchards paper pearls pottery roses
    rubber salt ships silk silver spices steel sugar tapestries theatres timber tin towers toys velvet vineyards violins
    wool
    """
)
"""What the places of the prose are known for."""
