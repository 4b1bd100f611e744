"""Word banks and sentence templates, from which all training text is made.

A template is a sentence with slots such as `{animal}`; `fill` puts a random word of the bank of that name
into each slot. Templates and names whose list starts with HELD_OUT never occur in training.
"""

import random
import re

CAPITALS = dict(
    pair.strip().split(":")
    for pair in ["\nFrance:Paris", " Germany:Berlin", " Italy:Rome", " Spain:Madrid", " Portugal:Lisbon", " Austria:Vienna", " Switzerland:Bern", "\nBelgium:Brussels", " the Netherlands:Amsterdam", " Denmark:Copenhagen", " Norway:Oslo", " Sweden:Stockholm", "\nFinland:Helsinki", " Iceland:Reykjavik", " Ireland:Dublin", " the United Kingdom:London", " Poland:Warsaw", "\nCzechia:Prague", " Slovakia:Bratislava", " Hungary:Budapest", " Romania:Bucharest", " Bulgaria:Sofia", " Greece:Athens", "\nCroatia:Zagreb", " Slovenia:Ljubljana", " Serbia:Belgrade", " Albania:Tirana", " Estonia:Tallinn", " Latvia:Riga", "\nLithuania:Vilnius", " Ukraine:Kyiv", " Belarus:Minsk", " Moldova:Chisinau", " Russia:Moscow", " Turkey:Ankara", "\nCyprus:Nicosia", " Malta:Valletta", " Georgia:Tbilisi", " Armenia:Yerevan", " Azerbaijan:Baku", " Israel:Jerusalem", "\nLebanon:Beirut", " Syria:Damascus", " Jordan:Amman", " Iraq:Baghdad", " Iran:Tehran", " Saudi Arabia:Riyadh", " Qatar:Doha", "\nOman:Muscat", " Yemen:Sanaa", " Egypt:Cairo", " Libya:Tripoli", " Tunisia:Tunis", " Algeria:Algiers", " Morocco:Rabat", "\nSudan:Khartoum", " Ethiopia:Addis Ababa", " Kenya:Nairobi", " Uganda:Kampala", " Rwanda:Kigali", " Tanzania:Dodoma", "\nZambia:Lusaka", " Zimbabwe:Harare", " Namibia:Windhoek", " Angola:Luanda", " Ghana:Accra", " Nigeria:Abuja", " Senegal:Dakar", "\nMali:Bamako", " Madagascar:Antananarivo", " Mozambique:Maputo", " Somalia:Mogadishu", " India:New Delhi", "\nPakistan:Islamabad", " Nepal:Kathmandu", " Bangladesh:Dhaka", " Thailand:Bangkok", " Vietnam:Hanoi", " Laos:Vientiane", "\nCambodia:Phnom Penh", " Indonesia:Jakarta", " the Philippines:Manila", " China:Beijing", " Japan:Tokyo", "\nSouth Korea:Seoul", " Mongolia:Ulaanbaatar", " Australia:Canberra", " New Zealand:Wellington", " Fiji:Suva", "\nCanada:Ottawa", " the United States:Washington", " Mexico:Mexico City", " Cuba:Havana", " Jamaica:Kingston", "\nBrazil:Brasilia", " Argentina:Buenos Aires", " Chile:Santiago", " Peru:Lima", " Colombia:Bogota", " Venezuela:Caracas\n"]
)

NAMES = ["Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo", "Mary", "Nina", "Oscar", "Peter", "Quinn", "Rachel", "Simon", "Tina", "Ursula", "Victor", "Wendy", "Xavier", "Yvonne", "Zoe", "Adam", "Bella", "Carl", "Diana", "Edward", "Fiona", "George", "Hannah", "Isaac", "Julia", "Kevin", "Laura", "Martin", "Nora", "Oliver", "Paula", "Robert", "Sarah", "Thomas", "Vera", "Walter", "Anna", "Brian", "Clara", "Daniel", "Elena", "Felix", "Gloria", "Hugo", "Ivan", "Jane", "Kate", "Louis", "Maria", "Nathan", "Olga", "Philip", "Rita", "Samuel", "Teresa", "Vincent", "William", "Amir", "Bruno", "Cecil", "Dora", "Ella", "Fred", "Greta", "Hans", "Ida", "Jonas", "Kira", "Linda", "Max", "Noah", "Otto", "Petra", "Rosa", "Stefan", "Tom", "Uma", "Viola", "Wanda", "Yusuf", "Zara", "Ben", "Chloe", "Dylan", "Eva", "Finn", "Gina", "Harry", "Isabel", "James", "Kim", "Lucas", "Mia", "Neil", "Omar", "Pam", "Ralph", "Sam", "Tara", "Ugo", "Val", "Will", "Yara", "Ahmed", "Boris", "Cora", "Dennis", "Erik", "Flora", "Gustav", "Helen", "Ingrid", "Jorge", "Klara", "Liam", "Mona", "Nick", "Olivia", "Pablo", "Ruth", "Sven", "Theo", "Lucy", "John", "Lily", "Michael", "Susan", "Richard", "Joseph", "Emily", "Jacob", "Ethan", "Sophie", "Ryan", "Aaron", "Claire", "Marcus", "Naomi"]
HELD_OUT_NAMES = ["Quentin", "Zelda", "Bertram", "Ophelia", "Lorenz", "Mirabel", "Tobias", "Winifred", "Casper", "Delphine", "Ignatius", "Juniper", "Kunigunde", "Leopold", "Marisol", "Nikolai", "Priscilla", "Rasmus", "Sigrid", "Thaddeus", "Ulrich", "Yolanda", "Agatha", "Barnaby", "Cordelia", "Dmitri", "Esmeralda", "Fabian", "Giselle", "Horatio"]

BANKS = {
    "name": NAMES,
    "city": list(CAPITALS.values()),
    "country": list(CAPITALS),
    "colour": ["red", "blue", "green", "yellow", "orange", "purple", "pink", "brown", "black", "white", "grey", "silver"],
    "animal": ["dog", "cat", "horse", "rabbit", "parrot", "goat", "sheep", "turtle", "snake", "mouse", "duck", "donkey", "frog", "hamster", "cow", "pig", "lizard", "pony", "goose", "owl"],
    "food": ["bread", "cheese", "soup", "rice", "pasta", "fish", "salad", "cake", "honey", "pizza", "fruit", "chocolate", "beans", "potatoes", "apples", "noodles", "eggs", "mushrooms", "nuts", "yogurt"],
    "job": ["doctor", "teacher", "baker", "farmer", "pilot", "painter", "lawyer", "nurse", "singer", "writer", "driver", "cook", "judge", "carpenter", "sailor", "soldier", "plumber", "dentist", "gardener", "librarian"],
    "thing": ["book", "table", "lamp", "chair", "window", "letter", "basket", "hammer", "clock", "mirror", "bottle", "box", "blanket", "ticket", "key", "camera", "bicycle", "coat", "hat", "umbrella", "map", "ladder", "piano", "guitar", "boat", "cup", "spoon", "candle", "carpet", "radio", "wheel", "pencil", "envelope", "drawer", "bucket", "rope", "stone", "bell", "ring", "coin", "knife"],
    "place": ["market", "garden", "kitchen", "library", "station", "harbour", "school", "museum", "forest", "river", "bridge", "village", "castle", "park", "office", "church", "farm", "beach", "valley", "street", "hotel", "bakery", "hospital", "theatre", "square", "field", "mountain", "lake", "island", "tower", "workshop", "cellar"],
    "adj": ["old", "small", "large", "quiet", "bright", "heavy", "broken", "clean", "empty", "warm", "cold", "new", "strange", "beautiful", "simple", "narrow", "long", "short", "round", "soft", "famous", "cheap", "useful", "dusty", "wooden"],
    "time": [
        "in the morning",
        "at noon",
        "in the evening",
        "at night",
        "last week",
        "yesterday",
        "on Monday",
        "on Friday",
        "on Sunday",
        "after lunch",
        "before dinner",
        "in summer",
        "in winter",
        "in spring",
        "every day",
        "once a year",
        "this afternoon",
        "a long time ago",
    ],
    "weather": ["rain", "snow", "wind", "fog", "sunshine", "hail", "frost", "thunder", "heat", "mist"],
    "verb": ["opened", "cleaned", "painted", "sold", "bought", "found", "carried", "repaired", "lost", "borrowed", "dropped", "moved", "hid", "measured"],
    "act": ["walked", "slept", "waited", "sang", "danced", "worked", "talked", "laughed", "rested", "played", "studied", "listened", "stayed", "stood"],
    "person": ["man", "woman", "child", "neighbour", "stranger", "king", "queen", "student", "guest", "friend", "brother", "sister", "uncle", "aunt", "mother", "father", "grandmother", "visitor", "worker", "traveller"],
    "number": ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty", "thirty", "fifty", "sixty"],
}

FILLERS = """The {person} {verb} the {adj} {thing} {time}.|{name} went to the {place} {time}.
{name} and {name} {act} near the {place}.|There is a {adj} {thing} in the {place}.
The {animal} {act} under the {adj} {thing}.|It was a day of {weather} and {weather}.
{name} bought some {food} and {food} at the {place}.|The {place} is {adj} and {adj} {time}.
My {person} likes to eat {food} {time}.|A {adj} {animal} ran across the {place}.
Nobody knew why the {thing} was so {adj}.|The {person} told a story about a {animal} and a {animal}.
{number} people {act} in the {place}.|The train leaves at {d}{d}:{d}{d} from the {adj} station.
{name} paid {d}{d} coins for the {thing}.|The {colour} {thing} belongs to the {person}.
The {job} {verb} a {colour} {thing}.|When the {weather} came, the {animal} {act} in the {place}.
Because of the {weather}, the {person} {act} in the {place}.|I saw {number} {colour} birds over the {place}.
The {job} and the {job} {act} together {time}.|{name} wrote a {adj} letter to the {person}.
We often talk about {food}, {weather} and the {place}.|In {city} the {place} is very {adj}.
{name} travelled from {city} to {city} {time}.|The road to the {place} is {adj}, but the {place} is {adj}.
The {person} did not find the {thing}, so the {person} {act}.
People say that the {place} near {city} is {adj}.|If you go to the {place}, take a {thing} with you.
The number of the room in the hotel was {d}{d}{d}{d}.|A {person} with a {colour} coat {act} at the {place}.
Some {animal}s are {adj}, others are {adj}.|The {animal} of the {person} was {colour} and {adj}.
{name} met a {job} in the {place}.|You can see the {place} from the {adj} tower.
It takes {number} days to reach {city}.|The {thing} was on the {thing}, next to the {adj} {thing}.
She {verb} the {thing} and {act}.|He {verb} {number} {thing}s and {act} {time}.
They {act} until the {weather} was over.|This year the {food} was {adj} and the {weather} was {adj}.
The weather report speaks of {weather} {time}.|Their {person} has never been to {country}.
Many visitors come to {country} to see the {place}.|Can you hear the {animal} in the {place}?
Look at the {adj} {thing}!|What a {adj} {place} this is!|The old word {new} means {adj} in our village.
Doctor {new} {verb} the {thing} of the {person}.|The shop sells {food}, {food} and {food}.
On the wall hung a picture of a {adj} {animal}.|The {job} asked for a {thing}, but nobody had one.
Every {person} in the {place} knows the {adj} {animal}.|The price of the {thing} went up to {d}{d}{d} coins.
Then the {weather} stopped and the {person} {act}.|{name} thinks that {food} is better than {food}.
At the {place}, {name} {verb} a {thing} for {name}.|Last year {name} was a {job} in {country}.
The {adj} {person} gave the {thing} to {name}.""".replace("\n", "|").split("|")

HELD_OUT_FILLERS = """Our {person} keeps {number} {animal}s behind the {place}.
Suddenly the {thing} fell off the {thing}.|How many {thing}s fit into a {adj} {thing}?
Between {city} and the {place} lies a {adj} forest.|Before sleeping, the {job} always drinks warm milk.
The festival ended with music, {food} and {weather}.
Neither {name} nor the {job} wanted to leave the {place}.|Yesterday's newspaper was full of {adj} stories.
An engineer explained how the machine cools itself.|Slowly, the {animal} climbed over the {adj} wall.
Trains, buses and boats were late because of {weather}.|The orchestra rehearsed in the {place} for hours.
She whispered that the {thing} had been {adj} for {d}{d} years.
Children were drawing {animal}s on the pavement.|Computers store pages of memory in small blocks.
Without a {thing}, {name} could not repair the engine.""".replace("\n", "|").split("|")

SYLLABLES = ["ba", "be", "bi", "bo", "da", "de", "do", "fa", "fe", "fi", "ga", "go", "ha", "ka", "ke", "ki", "ko", "la", "le", "li", "lo", "ma", "me", "mi", "mo", "na", "ne", "ni", "no", "pa", "pe", "po", "ra", "re", "ri", "ro", "sa", "se", "si", "so", "ta", "te", "ti", "to", "va", "ve", "vi", "za", "ze", "zo", "lan", "dor", "min", "ver", "tal", "ram", "sen", "kul", "nor", "bas", "fin", "gar", "mur", "tis", "vel", "zan", "wick", "ston", "bur", "eth", "ian", "elle", "ard"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BANK_NAMES = list(BANKS)
SLOT = re.compile(r"\{(\w+)\}")


def invented(rng: random.Random) -> str:
    """A word of no bank, such as `Talmero` or `Olirta`: makes the model copy what it never saw."""
    way = rng.randrange(4)
    if way == 0:
        word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))
    elif way == 1:  # vowels and consonants in turn
        kinds = "bcdfghjklmnpqrstvwxz", "aeiouy"
        word = "".join(rng.choice(kinds[i % 2]) for i in range(rng.randint(3, 8)))
    elif way == 2:  # head of one word, tail of another
        banks = "name", "city", "thing", "food"
        first, last = (rng.choice(BANKS[rng.choice(banks)]).lower() for _ in range(2))
        word = first[: rng.randint(2, 5)] + last[-rng.randint(2, 5) :]
    else:  # a name with letters changed
        letters = list(rng.choice(NAMES).lower())
        for _ in range(rng.randint(1, 3)):
            letters.insert(rng.randint(0, len(letters)), rng.choice(LETTERS))
        word = "".join(letters)
    return word.replace(" ", "").capitalize()


def salad(rng: random.Random) -> str:
    """Random words in a row, so that odd text does not confuse."""
    words = [rng.choice(BANKS[rng.choice(BANK_NAMES)]) for _ in range(rng.randint(3, 12))]
    words = [invented(rng) if rng.random() < 0.2 else word for word in words]
    words = [word.lower() if rng.random() < 0.5 else word for word in words]
    return words[0].capitalize() + " " + " ".join(words[1:]) + rng.choice(".....?!")


def fill(rng: random.Random, template: str) -> str:
    """Put words into a template. One word in thirty is an invented one; `{d}` is a digit."""

    def word(match):
        slot = match[1]
        if slot == "d":
            return str(rng.randrange(10))
        if slot == "new" or rng.random() < 0.03:
            return invented(rng)
        return rng.choice(BANKS[slot])

    sentence = SLOT.sub(word, template)
    return sentence[0].upper() + sentence[1:]


def filler(rng: random.Random, held_out: bool = False) -> str:
    """One filler sentence; with `held_out`, half of them come from templates that training never saw."""
    if not held_out and rng.random() < 0.08:
        return salad(rng)
    templates = HELD_OUT_FILLERS if held_out and rng.random() < 0.5 else FILLERS
    return fill(rng, rng.choice(templates))
